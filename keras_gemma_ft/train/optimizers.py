"""optax inside a Keras optimizer, and the learning-rate schedule of fine-tuning.

The optimizer's state is one Keras variable for each array of optax's state, named after what it is and whose
it is: `adamw/adam/mu/decoder/q_proj/lora_a`. So a checkpoint finds it by name, and Keras's trainer carries it
through jit like any other state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

from keras_gemma_ft.errors import UserError

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class WarmupThenDecay:
    """Linear warm-up to `peak`, then cosine or linear decay towards 0 just after the last step.

    The rate of step s of T, counted from 0, with W = round(warmup_ratio · T) warm-up steps, is
    peak · (s + 1) / (W + 1) while s < W; after that peak · (1 + cos(πp)) / 2 or peak · (1 - p), with
    p = (s - W) / (T - W). No step has a rate of 0, so the first one already learns. The cosine is that of
    Loshchilov & Hutter 2017, "SGDR", without restarts.
    """

    peak: float
    kind: Schedule = "cosine"
    warmup_ratio: float = 0.1

    def __call__(self, step: Any, total_steps: Any, xp: Any = np) -> Any:
        """The rate at `step`, in Python and numpy, or traced with `xp=jax.numpy`."""
        warmup = xp.round(self.warmup_ratio * total_steps)
        rising = (step + 1) / (warmup + 1)
        progress = xp.clip((step - warmup) / xp.maximum(total_steps - warmup, 1), 0, 1)
        falling = {
            "cosine": lambda: (1 + xp.cos(xp.pi * progress)) / 2,
            "linear": lambda: 1 - progress,
            "constant": lambda: xp.ones_like(progress),
        }[self.kind]()
        return self.peak * xp.where(step < warmup, rising, falling)


@keras.saving.register_keras_serializable(package="keras_gemma_ft")
class AdamW(keras.optimizers.Optimizer):
    """AdamW of optax as a Keras optimizer; `adamw` builds it with names of its own arguments.

    The length of the schedule is a state variable, so setting it does not compile anything anew.

    Args:
        learning_rate: The peak.
        schedule: "cosine", "linear" or "constant", after warm-up.
        warmup_ratio: Share of the steps that warm up.
        total_steps: Updates of the whole run; None: `fit` tells it through `PlanSchedule`.
        clip_norm: Global norm to which gradients are scaled down; None: no clipping.
        weight_decay: Decoupled; not for norms and scalars.
        name: Root of the names of its variables.
    """

    def __init__(
        self,
        learning_rate: float = 2e-4,
        schedule: Schedule = "cosine",
        warmup_ratio: float = 0.1,
        total_steps: int | None = None,
        clip_norm: float | None = 1.0,
        weight_decay: float = 0.0,
        name: str = "adamw",
    ) -> None:
        super().__init__(learning_rate=self._rate_now, name=name)
        self._settings = {
            "learning_rate": float(learning_rate),
            "schedule": schedule,
            "warmup_ratio": warmup_ratio,
            "total_steps": total_steps,
            "clip_norm": clip_norm,
            "weight_decay": weight_decay,
        }
        self.rate = WarmupThenDecay(float(learning_rate), schedule, warmup_ratio)
        # Clipping and decay are optax's: Keras would apply its own a second time if it knew of them.
        self._transformation = optax.named_chain(
            ("clip", optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()),
            ("adam", optax.scale_by_adam()),
            ("decay", optax.add_decayed_weights(weight_decay, mask=_decayed)),
        )
        self._names: list[str] = []
        # On the host too: during `fit`, Keras takes the values out of the variables.
        self._planned_steps = 1 if schedule == "constant" and not warmup_ratio else total_steps
        self._total_steps = self._state("total_steps", np.int32(total_steps or 0))
        self._optax_state: list[keras.Variable] = []
        self._structure: Any = None

    def plan(self, total_steps: int) -> None:
        """Sets the length of the schedule, unless the constructor was given one."""
        if self._settings["total_steps"] is None:
            self._total_steps.assign(total_steps)
            self._planned_steps = total_steps

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the update number `step`, counted from 0; computed on the host."""
        return float(self.rate(step, self._require_plan()))

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self._names = [variable.path for variable in variables]
        # Moments in float32 whatever the weights are in: bfloat16 would lose small changes of a mean.
        zeros = [jnp.zeros_like(variable.value, dtype=jnp.float32) for variable in variables]
        state = self._transformation.init(dict(zip(self._names, zeros, strict=True)))
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(state)
        self._optax_state = [self._state(_name(path), leaf) for path, leaf in leaves]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """One update of all variables, in place or inside Keras's stateless scope."""
        if trainable_variables is not None and not self.built:
            self.build(list(trainable_variables))
        self._require_plan()
        variables = list(trainable_variables or self._trainable_variables)
        self._check_variables_are_known(variables)
        names = [self._names[self._get_variable_index(variable)] for variable in variables]
        weights = dict(zip(names, (jnp.asarray(variable.value) for variable in variables), strict=True))
        gradients = {
            name: jnp.zeros_like(weights[name], jnp.float32)
            if gradient is None
            else jnp.asarray(gradient, jnp.float32)
            for name, gradient in zip(names, grads, strict=True)
        }
        state = jax.tree.unflatten(self._structure, [variable.value for variable in self._optax_state])
        updates, state = self._transformation.update(gradients, state, weights)
        rate = jnp.asarray(self._rate_now(), jnp.float32)
        for name, variable in zip(names, variables, strict=True):
            # The sum is made in float32 and rounded once, to the dtype of the weight.
            changed = weights[name].astype(jnp.float32) - rate * updates[name]
            variable.assign(changed.astype(weights[name].dtype))
        for variable, value in zip(self._optax_state, jax.tree.leaves(state), strict=True):
            variable.assign(value)
        self._iterations.assign_add(1)

    def get_config(self) -> dict[str, Any]:
        return {**self._settings, "name": self.name}

    def _rate_now(self) -> Any:
        step, total = jnp.asarray(self._iterations.value), jnp.asarray(self._total_steps.value)
        return self.rate(step, jnp.maximum(total, 1), jnp)

    def _require_plan(self) -> int:
        if self._planned_steps is None:
            raise UserError(
                "the length of the learning-rate schedule is not known",
                where="adamw(total_steps=None)",
                remedy="give adamw(…, total_steps=…), or fit with the callback PlanSchedule().",
            )
        return self._planned_steps

    def _state(self, name: str, value: Any) -> keras.Variable:
        with keras.name_scope(self.name, caller=self):
            variable = keras.Variable(
                value, name=name.replace("/", "."), dtype=str(value.dtype), trainable=False
            )
        self._track_variable(variable)
        return variable


def adamw(
    learning_rate: float = 2e-4,
    schedule: Schedule = "cosine",
    warmup_ratio: float = 0.1,
    total_steps: int | None = None,
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) with warm-up and decay, as the fine-tuning guide sets it.

    `model.compile(optimizer=adamw(2e-4))` is enough: with `total_steps=None` the schedule spans the
    `epochs` × steps of the `fit` that follows, which the callback `PlanSchedule` tells it.
    """
    return AdamW(learning_rate, schedule, warmup_ratio, total_steps, clip_norm, weight_decay)


class PlanSchedule(keras.callbacks.Callback):
    """Tells the model's optimizer how many updates `fit` will make: what was made, and steps × epochs."""

    def on_train_begin(self, logs: Any = None) -> None:
        plan: Callable[[int], None] | None = getattr(self.model.optimizer, "plan", None)
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        if plan is None or not steps or not epochs:
            return
        plan(int(self.model.optimizer.iterations) + steps * epochs)


def _decayed(weights: dict[str, Any]) -> dict[str, bool]:
    return {name: not any(word in name for word in ("norm", "scalar")) for name in weights}


def _name(path: Sequence[Any]) -> str:
    """`adam/count`, `adam/mu/<path of the weight>`: the keys on the way to an array of optax's state."""
    keys = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path]
    return "/".join(str(key) for key in keys if not isinstance(key, int))
