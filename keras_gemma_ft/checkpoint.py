"""Checkpoints of a run, by Orbax: what is trained, how far, and never the frozen base.

On disk, under the run's `checkpoints/`, one directory for each step that is kept, the best and the last:

    checkpoints/120/weights     adapters (or all weights, for method full), by name relative to the model
    checkpoints/120/optimizer   its variables, by name
    checkpoints/120/random      states of the model's seed generators, in their order

with the step, the held-out measurement and the data position as Orbax metadata. Orbax writes a directory
beside and renames it when it is whole, so a run killed while saving leaves the checkpoints of before.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import jax
import keras
import numpy as np

from keras_gemma_ft.best_metric import rank
from keras_gemma_ft.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from keras_gemma_ft.model.causal_lm import GemmaCausalLM

Which = Literal["best", "last"]
RESUMABLE = ("weights", "optimizer", "random")


@dataclass(frozen=True)
class Saved:
    """One checkpoint.

    Attributes:
        step: Updates made when it was saved.
        eval_loss: Held-out loss at that step; None where it was not measured.
        position: What the run needs to go on with the data: plain JSON.
        metric: By which the run's best checkpoint is chosen.
        value: Of that metric, at that step; None where it was not measured.
    """

    step: int
    eval_loss: float | None = None
    position: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "loss"
    value: float | None = None


class Checkpoints:
    """Writes the checkpoints of a run in the background; use as a context, which ends when all is on disk.

    Args:
        directory: The run's `checkpoints/`; created. Remains of a save that was killed are removed.
        metric: By which the best one is chosen: one of `best_metric.NAMES`.
    """

    def __init__(self, directory: str | Path, metric: str = "loss") -> None:
        from orbax.checkpoint import v1 as orbax

        self._metric = metric
        policies = orbax.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=_rank,  # Orbax's best is the last when sorted by it
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._directory = Path(directory).absolute()
        self._writer = orbax.training.Checkpointer(
            self._directory,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            cleanup_tmp_directories=True,
        )
        self._pending: Any = None
        latest = self._writer.latest
        self.last_step: int | None = latest.step if latest is not None else None
        """Step of the latest checkpoint, on disk or on its way there."""

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(
        self,
        model: keras.Model,
        step: int,
        *,
        eval_loss: float | None = None,
        value: float | None = None,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves the model's state, copied before this returns; the writing goes on in the background.

        During `fit`, call `model.jax_state_sync()` first. A checkpoint of that step that exists is replaced.

        Args:
            model: Compiled, if the run is to go on from there.
            step: Updates made.
            eval_loss: Held out, at that step; without it the checkpoint cannot be the best.
            value: Of the metric by which the best is chosen, if that is not the loss.
            position: See `Saved`.

        Raises:
            OSError: There is no room for it, or the one before could not be written.
        """
        self.wait()
        measured = {"loss": eval_loss} if self._metric == "loss" else {"loss": eval_loss, self._metric: value}
        # Copies, because the buffers of variables are donated to the next step. Many processes hand over
        # their own shards instead and wait for the end.
        many = jax.process_count() > 1
        state = {
            part: {
                name: variable.value if many else np.array(variable.value) for name, variable in items.items()
            }
            for part, items in _state(model).items()
        }
        if not many:
            _require_room(self._directory, state)
        self._pending = self._writer.save_checkpointables_async(
            step,
            {part: values for part, values in state.items() if values},
            force=True,
            overwrite=self.last_step == step,
            metrics=None if None in measured.values() else _to_store(measured),
            custom_metadata={
                "step": step,
                "eval_loss": eval_loss,
                "metric": self._metric,
                "value": measured[self._metric],
                "position": dict(position or {}),
            },
        )
        self.last_step = step
        if many:
            self.wait()

    def wait(self) -> None:
        """Returns when the latest save is whole on disk.

        Raises:
            OSError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except ValueError as error:  # so TensorStore puts it
                if "No space left" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory)) from error

    def close(self) -> None:
        """Waits for the latest save and releases Orbax's threads."""
        self.wait()
        self._writer.close()


def find(directory: str | Path, which: Which | int = "last") -> Saved | None:
    """The best or the last checkpoint, or that of a given step; None where there is none.

    The best is that by the metric that the run names; where none was measured, the last.
    """
    from orbax.checkpoint import v1 as orbax

    directory = Path(directory).absolute()
    if not directory.is_dir():
        return None
    with orbax.training.Checkpointer(directory) as reader:
        steps = {item.step: item.metrics for item in reader.checkpoints}
        measured = {step: metrics for step, metrics in steps.items() if metrics}
        if not steps or (isinstance(which, int) and which not in steps):
            return None
        if isinstance(which, int):
            step = which
        elif which == "best" and measured:
            step = max(measured, key=lambda step: (*_rank(measured[step]), step))
        else:
            step = max(steps)
        metadata = reader.checkpointables_metadata(step).custom_metadata or {}
    loss, position = metadata.get("eval_loss"), metadata.get("position") or {}
    return Saved(step, loss, position, metadata.get("metric", "loss"), metadata.get("value", loss))


def restore(
    model: keras.Model, directory: str | Path, which: Which | int = "last", *, resume: bool = False
) -> Saved:
    """Puts the trained weights of a checkpoint into a model that has the same adapters.

    Args:
        model: Built, with `enable_lora` called as in the run (or none, for method full).
        directory: The run's `checkpoints/`.
        which: "best" by the run's metric, "last", or a step.
        resume: Also the optimizer and the random state, of a compiled model, to go on training.

    Raises:
        UserError: There is no such checkpoint, or it does not fit the model; then nothing is changed.
    """
    from orbax.checkpoint import v1 as orbax

    saved = _found(directory, which)
    state = {part: items for part, items in _state(model).items() if items and (resume or part == "weights")}
    with orbax.training.Checkpointer(Path(directory).absolute()) as reader:
        stored = reader.checkpointables_metadata(saved.step).metadata
        for part, items in state.items():
            _require_fit(part, items, stored.get(part) or {}, f"{directory}/{saved.step}")
        wanted_arrays = {
            part: {name: _abstract(variable) for name, variable in items.items()}
            for part, items in state.items()
        }
        values = reader.load_checkpointables(saved.step, wanted_arrays)
    for part, items in state.items():
        for name, variable in items.items():
            variable.assign(values[part][name])
    return saved


def tuned_model(
    config: ConfigDict, workdir: str | Path, which: Which | int = "best"
) -> tuple[GemmaCausalLM, Saved]:
    """The model that a run trained: its preset's, with the weights of a checkpoint.

    Args:
        config: Of the run.
        workdir: Its directory.
        which: "best" by the run's metric, "last", or a step.

    Raises:
        UserError: There is no such checkpoint, or no such preset.
    """
    from keras_gemma_ft.model.from_config import build_model

    directory = Path(workdir).expanduser() / "checkpoints"
    saved = _found(directory, which)  # before minutes are spent on the preset
    model = build_model(config)
    return model, restore(model, directory, saved.step)


def load_weights(directory: str | Path, which: Which | int = "best") -> dict[str, np.ndarray]:
    """The trained weights of a checkpoint by name, in host memory, without a model.

    Raises:
        UserError: There is no such checkpoint.
    """
    from orbax.checkpoint import v1 as orbax

    saved = _found(directory, which)
    with orbax.training.Checkpointer(Path(directory).absolute()) as reader:
        stored = reader.checkpointables_metadata(saved.step).metadata["weights"]
        wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
        return reader.load_checkpointables(saved.step, {"weights": wanted})["weights"]


def _found(directory: str | Path, which: Which | int) -> Saved:
    saved = find(directory, which)
    if saved is None:
        wanted = f" of step {which}" if isinstance(which, int) else ""
        raise UserError(
            f"holds no checkpoint{wanted}",
            where=str(directory),
            remedy="train first: keras-gemma-ft train --config=… --workdir=….",
        )
    return saved


def relative_name(model: keras.Model, path: str) -> str:
    """A variable's path without the model's own name, which Keras counts up within a process."""
    root = f"{model.name}/"
    return path.removeprefix(root).replace(f".{model.name}.", ".")


def _state(model: keras.Model) -> dict[str, dict[str, keras.Variable]]:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    generators = [
        variable
        for variable in model.non_trainable_variables
        if variable.path.endswith("seed_generator_state")
    ]
    return {
        "weights": _by_name(model, model.trainable_variables),
        "optimizer": _by_name(model, optimizer.variables if optimizer is not None else []),
        "random": {str(place): variable for place, variable in enumerate(generators)},
    }


def _by_name(model: keras.Model, variables: list[keras.Variable]) -> dict[str, keras.Variable]:
    named = {relative_name(model, variable.path): variable for variable in variables}
    if len(named) != len(variables):
        raise ValueError(
            "two variables of the model have the same path, so a checkpoint could not tell them apart"
        )
    return named


def _require_fit(
    part: str, items: Mapping[str, keras.Variable], stored: Mapping[str, Any], where: str
) -> None:
    for name, variable in items.items():
        if name not in stored:
            what = f"has no {part} for {name!r}"
        elif tuple(stored[name].shape) != tuple(variable.shape):
            shapes = f"{tuple(stored[name].shape)}, in the model {tuple(variable.shape)}"
            what = f"holds {part} {name!r} of shape {shapes}"
        else:
            continue
        raise UserError(
            what, where=where, remedy="use the preset, method and lora.* of the run (its config.json)."
        )
    unused = sorted(stored.keys() - items.keys())
    if unused:
        raise UserError(
            f"holds {part} {unused[0]!r}, which the model has not",
            where=where,
            remedy="use the preset, method and lora.* of the run (its config.json).",
        )


def _require_room(directory: Path, state: Mapping[str, Any]) -> None:
    """Says so at once where there is none; Orbax would in its threads, and to us when we save again."""
    size = sum(value.nbytes for part in state.values() for value in part.values())
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _abstract(variable: keras.Variable) -> jax.ShapeDtypeStruct:
    value = variable.value
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)


def _to_store(measured: Mapping[str, float | None]) -> dict[str, float]:
    """What Orbax keeps beside a checkpoint: `{"eval_loss": 0.5, "eval_accuracy": 0.75}`.

    A loss that is not finite, which JSON cannot hold, is the worst there is.
    """
    return {
        f"eval_{name}": value if math.isfinite(value) else 1e30
        for name, value in measured.items()
        if value is not None
    }


def _rank(stored: Mapping[str, float]) -> tuple[float, float]:
    """`best_metric.rank` of what `_to_store` made; the loss alone is a metric too."""
    values = {name.removeprefix("eval_"): value for name, value in stored.items()}
    metric = next((name for name in values if name != "loss"), "loss")
    return rank(metric, values[metric], values["loss"])
