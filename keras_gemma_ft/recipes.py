"""Finding and reading what to run: the Python file of a recipe or a sweep, or the config.json of a run."""

from __future__ import annotations

import difflib
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from keras_gemma_ft.config import BY_NAME, config_from
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.json_files import read_json

_INSTALLED = Path(__file__).parent / "configs"  # from a wheel; in a clone, beside the package
_SHIPPED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def shipped() -> dict[str, Path]:
    """The recipes that come with the project, by name: `tiny`, `data/gsm8k`."""
    return {
        path.relative_to(_SHIPPED).with_suffix("").as_posix(): path
        for pattern in ("[!_]*.py", "data/[!_]*.py")
        for path in sorted(_SHIPPED.glob(pattern))
    }


def shipped_sweeps() -> dict[str, Path]:
    """The sweeps that come with the project, by name: `rank_and_rate`."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("sweeps/[!_]*.py"))}


def read_recipe(name: str) -> ConfigDict:
    """What `get_config()` of a recipe returns; not validated yet, as flags may still change it.

    Args:
        name: A path, or the name of a shipped recipe: `tiny`, `tiny.py`, `configs/tiny.py`.

    Raises:
        UserError: There is no such file, it fails, or it returns no config.
    """
    path = _find(name, shipped(), "config")
    config = _call(path, "get_config", "see configs/tiny.py for an example.")
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() returned {type(config).__name__}",
            where=str(path),
            remedy="return what keras_gemma_ft.config.default_config() gives, with your changes.",
        )
    return config


def read_sweep(name: str) -> tuple[Any, Path]:
    """What `get_sweep()` of a sweep's file returns, and where that file is.

    Args:
        name: A path, or the name of a shipped sweep: `rank_and_rate`, `configs/sweeps/rank_and_rate.py`.

    Raises:
        UserError: There is no such file, or it fails.
    """
    path = _find(name, shipped_sweeps(), "sweep")
    return _call(path, "get_sweep", "see configs/sweeps/rank_and_rate.py for an example."), path


def read_run_config(workdir: str | Path) -> ConfigDict:
    """The config of a run.

    Raises:
        UserError: The directory holds no run, or its config.json is faulty.
    """
    path = Path(workdir).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(
            "holds no run: there is no config.json",
            where=f"--workdir={workdir}",
            remedy="give the --workdir of a run that `keras-gemma-ft train` made.",
        )
    return config_from(read_json(path))


def _find(name: str, known: Mapping[str, Path], kind: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    asked = name.removeprefix("configs/").removeprefix("sweeps/").removesuffix(".py")
    if asked not in known:
        near = difflib.get_close_matches(asked, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no such {kind} file",
            where=f"--{kind}={name}",
            remedy=f"{hint}Give a path, or one of those that come with the project: {', '.join(known)}.",
        )
    return known[asked]


def _call(path: Path, function: str, example: str) -> Any:
    try:
        return runpy.run_path(str(path))[function]()
    except UserError:
        raise
    except Exception as error:
        raise _faulty(path, error, function, example) from error


def _faulty(path: Path, error: Exception, function: str, example: str) -> UserError:
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    if isinstance(error, KeyError) and error.args == (function,) and not lines:
        return UserError(f"defines no {function}()", where=where, remedy=example)
    missing = re.match(r"'?Key \"(\w+)\" does not exist", str(error))
    if missing:
        leaves = {name.split(".")[-1]: name for name in reversed(BY_NAME)}
        near = difflib.get_close_matches(missing[1], leaves, 1)
        return UserError(
            f"there is no config field {missing[1]!r} there",
            where=where,
            remedy=f"did you mean {leaves[near[0]]}?"
            if near
            else "keras-gemma-ft train --help lists the fields.",
        )
    message = str(error).splitlines()[0] if str(error) else ""
    return UserError(f"{type(error).__name__}: {message}", where=where, remedy="correct the file.")
