"""Finding and reading a config: a recipe's Python file, or the config.json of a run."""

from __future__ import annotations

import difflib
import re
import runpy
import traceback
from pathlib import Path

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


def read_recipe(name: str) -> ConfigDict:
    """What `get_config()` of a recipe returns; not validated yet, as flags may still change it.

    Args:
        name: A path, or the name of a shipped recipe: `tiny`, `tiny.py`, `configs/tiny.py`.

    Raises:
        UserError: There is no such file, it fails, or it returns no config.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        known = shipped()
        asked = name.removeprefix("configs/").removesuffix(".py")
        if asked not in known:
            near = difflib.get_close_matches(asked, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                "there is no such config file",
                where=f"--config={name}",
                remedy=f"{hint}Give a path, or one of those that come with the project: {', '.join(known)}.",
            )
        path = known[asked]
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except UserError:
        raise
    except Exception as error:
        raise _faulty(path, error) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() returned {type(config).__name__}",
            where=str(path),
            remedy="return what keras_gemma_ft.config.default_config() gives, with your changes.",
        )
    return config


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


def _faulty(path: Path, error: Exception) -> UserError:
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    if isinstance(error, KeyError) and error.args == ("get_config",) and not lines:
        return UserError("defines no get_config()", where=where, remedy="see configs/tiny.py for an example.")
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
    return UserError(f"{type(error).__name__}: {message}", where=where, remedy="correct the config file.")
