"""`LearningAudit`: stops a run at its first step if something that should learn does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.train.audit import Audit, audit, module_of, require_learning
from keras_gemma_ft.train.callbacks.live_weights import snapshot

# Updates are measured on a copy of the trainable variables, so only where that copy is small: adapters, not
# full models.
_MOST_COPIED = 200_000_000

Gradients = Callable[[Any], tuple[float, int, Mapping[str, Any]]]


class LearningAudit(keras.callbacks.Callback):
    """Gradient norm and update norm per module group after step 1, and a watch on the loss from then on.

    Args:
        batch: The first batch of the run.
        gradients: Maps a batch to (loss, supervised tokens, gradient by variable path) without changing the
            model; None: `keras_gradients` of the model, for `(x, y)` batches of an ordinary Keras model.
        targets: Names of which each must occur in the name of a group that receives gradient; None: all
            trainable groups.
        group_of: Path of a variable to the name of its group.
        layer_axes: How many leading axes of a variable count layers.
        report: Called with the audit once it is complete.

    Raises:
        UserError: During `fit`, when the first step shows that something does not learn, or when the loss is
            not finite later on.
    """

    def __init__(
        self,
        batch: Any,
        *,
        gradients: Gradients | None = None,
        targets: Sequence[str] | None = None,
        group_of: Callable[[str], str] = module_of,
        layer_axes: Callable[[str], int] = lambda path: 0,
        report: Callable[[Audit], None] | None = None,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.gradients = gradients
        self.targets = targets
        self.group_of = group_of
        self.layer_axes = layer_axes
        self.report = report
        self.result: Audit | None = None
        self._first: tuple[float, int, Mapping[str, Any]] | None = None
        self._before: dict[str, np.ndarray] | None = None
        self._unread: tuple[int, Any] | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        compute = self.gradients or (lambda batch: keras_gradients(self.model, *batch))
        self._first = compute(self.batch)
        self._unread = None
        require_learning(self._audit(None), self.targets)
        if sum(int(np.prod(variable.shape)) for variable in self.model.trainable_variables) <= _MOST_COPIED:
            self._before = snapshot(self.model)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._first is not None:
            self._finish()
        # The loss is read a step late: the device is not kept waiting for it.
        if self._unread is not None:
            _require_finite(*self._unread)
        self._unread = (batch + 1, logs["loss"]) if logs and "loss" in logs else None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._unread is not None:
            _require_finite(*self._unread)
            self._unread = None

    def _finish(self) -> None:
        updates = None
        if self._before is not None:
            updates = {path: value - self._before[path] for path, value in snapshot(self.model).items()}
        self.result = self._audit(updates)
        self._first = self._before = self.batch = None
        if self.report is not None:
            self.report(self.result)

    def _audit(self, updates: Mapping[str, Any] | None) -> Audit:
        assert self._first is not None
        return audit(*self._first, updates=updates, group_of=self.group_of, layer_axes=self.layer_axes)


def _require_finite(step: int, loss: Any) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise UserError(
            f"the loss is {value} at step {step} of this epoch",
            where="train",
            remedy="lower train.learning_rate or train.clip_norm, and use precision 'bfloat16' or 'float32'.",
        )


def keras_gradients(model: keras.Model, x: Any, y: Any = None) -> tuple[float, int, dict[str, Any]]:
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
    return float(loss), int(np.size(y)) if y is not None else 1, dict(zip(paths, gradients, strict=True))
