"""`LearningAudit`: stops a run at its first step if something that should learn does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.train.audit import Audit, Gradient, audit, module_of, require_learning
from keras_gemma_ft.train.callbacks.live_weights import snapshot

# Updates are measured on a copy of the trainable variables, so only where that copy is small: adapters, not
# full models.
_MOST_COPIED = 200_000_000


class LearningAudit(keras.callbacks.Callback):
    """Gradient norm and update norm per module group after step 1, and a watch on the loss from then on.

    Args:
        batch: The first (x, y) of an ordinary Keras model, whose gradients are then computed apart, before
            anything is trained. None: the model logs them itself, as `GemmaCausalLM` does after
            `compile(log_gradients=True)`; that costs no compilation.
        targets: Names of which each must occur in the name of a group that receives gradient; None: all
            trainable groups.
        group_of: Path of a variable to the name of its group.
        first_step: Steps that were made before this `fit`: after the first of all, nothing is audited.
        report: Called with the audit once it is complete.

    Raises:
        UserError: During `fit`, when the first step shows that something does not learn, or when the loss is
            not finite later on.
    """

    def __init__(
        self,
        batch: Any = None,
        *,
        targets: Sequence[str] | None = None,
        group_of: Callable[[str], str] = module_of,
        first_step: int = 0,
        report: Callable[[Audit], None] | None = None,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.targets = targets
        self.group_of = group_of
        self.first_step = first_step
        self.report = report
        self.result: Audit | None = None
        self._first: tuple[float, int, Mapping[str, Gradient]] | None = None
        self._before: dict[str, np.ndarray] | None = None
        self._unread: tuple[int, Any] | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._unread = None
        if self.first_step:
            return
        if self.batch is not None:
            self._first = keras_gradients(self.model, *self.batch)
            require_learning(self._audit(None), self.targets)
        if sum(int(np.prod(variable.shape)) for variable in self.model.trainable_variables) <= _MOST_COPIED:
            self._before = snapshot(self.model)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self.result is None and not self.first_step:
            self._finish(logs or {})
        # The loss is read a step late: the device is not kept waiting for it.
        if self._unread is not None:
            _require_finite(*self._unread)
        step = self.first_step + batch + 1
        self._unread = (step, logs["loss"]) if logs and "loss" in logs else None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._unread is not None:
            _require_finite(*self._unread)
            self._unread = None

    def _finish(self, logs: Mapping[str, Any]) -> None:
        if self._first is None:
            sizes = {variable.path: math.prod(variable.shape) for variable in self.model.trainable_variables}
            squared = {path: np.asarray(value) for path, value in logs["squared_gradients"].items()}
            gradients = {path: Gradient(squared[path], size) for path, size in sizes.items()}
            self._first = float(logs["loss"]), int(logs["tokens"]), gradients
        updates = None
        if self._before is not None:
            updates = {path: value - self._before[path] for path, value in snapshot(self.model).items()}
        self.result = self._audit(updates)
        self._first = self._before = self.batch = None
        require_learning(self.result, self.targets)
        if self.report is not None:
            self.report(self.result)

    def _audit(self, updates: Mapping[str, Any] | None) -> Audit:
        assert self._first is not None
        return audit(*self._first, updates=updates, group_of=self.group_of)


def _require_finite(step: int, loss: Any) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise UserError(
            f"the loss is {value} at step {step}",
            where="train",
            remedy="lower train.learning_rate or train.clip_norm, and use precision 'bfloat16' or 'float32'.",
        )


def keras_gradients(model: keras.Model, x: Any, y: Any = None) -> tuple[float, int, dict[str, Gradient]]:
    """Loss, number of targets and gradient by variable path of an ordinary Keras model on the JAX backend.

    The model is left as it is. Every element of `y` counts as supervised.
    """
    import jax

    values = lambda variables: [variable.value for variable in variables]  # noqa: E731
    loss_and_gradients = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)
    (loss, _), gradients = loss_and_gradients(
        values(model.trainable_variables),
        values(model.non_trainable_variables),
        values(model.metrics_variables),
        x,
        y,
        None,
        training=True,
        optimizer_variables=values(model.optimizer.variables),
    )
    paths = [variable.path for variable in model.trainable_variables]
    squared = {path: Gradient.of(value) for path, value in zip(paths, gradients, strict=True)}
    return float(loss), int(np.size(y)) if y is not None else 1, squared
