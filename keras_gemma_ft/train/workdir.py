"""The run directory: whether it can be used, and what is written there besides metrics and checkpoints.

config.json  manifest.json  metrics.jsonl  tensorboard/  checkpoints/
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from keras_gemma_ft import backend
from keras_gemma_ft.best_metric import LOSSES
from keras_gemma_ft.config import config_from, flatten
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.json_files import read_json, write_json

# What a resumed run may change: nothing that the batches, the schedule or the weights depend on. (train.remat
# and train.unroll compute the same numbers otherwise.)
_MAY_CHANGE = (
    "train.answers",
    "train.eval_every",
    "train.on_overfitting",
    "train.remat",
    "train.trackers",
    "train.unroll",
    "task.kind",
)


def check(workdir: str | Path, *, resume: bool) -> Path:
    """Whether a run can start (or go on) there; creates nothing.

    Raises:
        UserError: It cannot be written to, holds a run already, or holds none to resume.
    """
    path = Path(workdir).expanduser().absolute()
    existing = path
    while not existing.exists():
        existing = existing.parent
        if existing.is_symlink():
            break
    if not existing.is_dir():
        raise UserError(
            f"{existing} is a file, so no directory can be made there",
            where=f"--workdir={workdir}",
            remedy="choose a directory that you may write to.",
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{existing} is not writable",
            where=f"--workdir={workdir}",
            remedy="choose a directory that you may write to.",
        )
    has_run = (path / "config.json").exists()
    if has_run and not resume:
        raise UserError(
            "holds a run already",
            where=f"--workdir={workdir}",
            remedy="add --resume to continue it, or choose another directory.",
        )
    if resume and not has_run:
        raise UserError(
            "holds no run to resume", where=f"--workdir={workdir}", remedy="leave --resume out to start one."
        )
    return path


def check_same_config(path: Path, config: Mapping[str, Any]) -> None:
    """A resumed run must be the same run.

    Raises:
        UserError: Naming the first field that differs and may not.
    """
    before = dict(flatten(config_from(read_json(path / "config.json"))))
    now = dict(flatten(config))
    may_change = set(_MAY_CHANGE)
    if now["train.best_metric"] not in LOSSES:
        may_change -= {"train.answers", "task.kind"}  # what is measured then follows from them
    for name, value in now.items():
        if name not in may_change and before[name] != value:
            raise UserError(
                f"was {before[name]!r} when the run started and is {value!r} now",
                where=name,
                remedy="resume without --config to use the run's own, or start another run.",
            )


def environment() -> dict[str, Any]:
    """Versions and devices, for the manifest."""
    import jax

    packages = {}
    for name in ("keras-gemma-ft", "jax", "keras", "keras-hub", "optax", "orbax-checkpoint", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **packages,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
    }


def record(path: Path, value: Mapping[str, Any]) -> None:
    """Writes config.json or manifest.json; of several processes the first one does."""
    if backend.is_first_process():
        write_json(path, value)


@contextmanager
def nothing_half_written(place: Path) -> Iterator[None]:
    """If the block fails, the directories that it made are gone again.

    Args:
        place: The run directory, which the block may create.
    """
    made = [path for path in (place / "data", place, *place.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if place / "data" in made:
            shutil.rmtree(place / "data", ignore_errors=True)
        for path in made[1:]:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
