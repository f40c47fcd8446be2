"""Weights & Biases and trackio: a run's numbers for a library that watches many runs.

Both are extras, and neither can end a run: what fails is said once, and the run goes on without that tracker.
Its numbers are in `metrics.jsonl` in any case.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from keras_gemma_ft.config import listed
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.json_files import read_json, write_json
from keras_gemma_ft.train.tensorboard import TAGS

PROJECT = "keras-gemma-ft"

Log = Callable[[Mapping[str, float], int], Any]
Finish = Callable[[], Any]


@dataclass(frozen=True)
class Identity:
    """By what a tracker knows a run, so that a run that is resumed goes on there, too.

    Attributes:
        id: Unique; kept in the run directory.
        name: For people: the end of the directory's path, and the id.
        directory: The run directory.
    """

    id: str
    name: str
    directory: Path

    @classmethod
    def of(cls, workdir: Path) -> Identity:
        path = workdir / "trackers.json"
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(4)})
        own = read_json(path)["id"]
        return cls(own, "-".join([*workdir.absolute().parts[-2:], own]).lstrip("/"), workdir)


def require(names: str) -> None:
    """Makes sure that libraries are there, before a run depends on it.

    Args:
        names: As `train.trackers` has them.

    Raises:
        UserError: One cannot be imported; the remedy names its extra.
    """
    for name in listed(names):
        _library(name)


def trackers(config: ConfigDict, workdir: Path, tell: Callable[[str], None]) -> list[Tracker]:
    """A writer for each library that `train.trackers` names.

    Raises:
        UserError: As `require` does.
    """
    names = listed(config.train.trackers)
    return [Tracker(name, Identity.of(workdir), config.to_dict(), tell) for name in names]


class Tracker:
    """Gives the numbers that TensorBoard gets, under the same names, to another library.

    Args:
        name: "wandb" or "trackio".
        identity: Of the run.
        config: Of the run, as it is shown there.
        tell: Given a line when the library fails.
    """

    def __init__(
        self, name: str, identity: Identity, config: Mapping[str, Any], tell: Callable[[str], None]
    ) -> None:
        library = _library(name)
        self._name = name
        self._tell = tell
        self._open: tuple[Log, Finish] | None = None
        try:
            self._open = _START[name](library, identity, config)
        except Exception as error:  # without an account or a network a run is as good as with them
            self._give_up(error)

    def write(self, record: dict[str, Any]) -> None:
        values = {tag: record[name] for name, tag in TAGS.items() if name in record}
        if self._open is None or not values:
            return
        log, _ = self._open
        try:
            log(values, record["step"])
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._open is None:
            return
        _, finish = self._open
        try:
            finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._open = None
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self._tell(f"{self._name} records no more ({reason}); the run goes on, and metrics.jsonl has it all")


def _start_wandb(library: Any, identity: Identity, config: Mapping[str, Any]) -> tuple[Log, Finish]:
    run = library.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=identity.id,
        name=identity.name,
        dir=str(identity.directory),
        config=config,
        resume="allow",
    )
    # Its own count of steps cannot go back, as ours does where a run resumes after its last checkpoint.
    run.define_metric("*", step_metric="step")
    return lambda values, step: run.log({**values, "step": step}), run.finish


def _start_trackio(library: Any, identity: Identity, config: Mapping[str, Any]) -> tuple[Log, Finish]:
    run = library.init(project=PROJECT, name=identity.name, config=config, resume="allow")
    return lambda values, step: run.log(dict(values), step=step), run.finish


_START: Mapping[str, Callable[[Any, Identity, Mapping[str, Any]], tuple[Log, Finish]]] = {
    "wandb": _start_wandb,
    "trackio": _start_trackio,
}


def _library(name: str) -> Any:
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        reason = str(error)
    else:
        # A folder of that name, such as the one that wandb leaves where it runs, can be imported as well.
        if hasattr(library, "init"):
            return library
        reason = "what is imported by that name is another thing"
    raise UserError(
        f"{name} cannot be used: {reason}",
        where="train.trackers",
        remedy=f"pip install 'keras-gemma-ft[{name}]', or leave it out.",
    )
