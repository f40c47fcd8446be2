"""Results on disk: JSON that every reader accepts, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keras_gemma_ft.errors import UserError, is_full


def write_text(path: str | Path, text: str) -> None:
    """Replaces a file in one step, so that a reader never sees half of it.

    Raises:
        UserError: It cannot be written.
        OSError: The disk is full; see `errors.is_full`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if is_full(error):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise UserError(
            f"cannot write there: {error.strerror}",
            where=str(path),
            remedy="choose a directory you may write to.",
        ) from error


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON; what is not finite becomes null, as JSON has no NaN."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_text(
        path,
        "".join(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in records),
    )


def read_json(path: str | Path) -> Any:
    """Reads one JSON file.

    Raises:
        UserError: It is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {_reason(error)}", where=str(path)) from error


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Reads JSON lines; a last line that a killed run left half-written is passed over.

    Raises:
        UserError: The file is missing, or another line is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {_reason(error)}", where=str(path)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise UserError(f"is no JSON: {error.msg}", where=f"{path}:{number}") from error
        if not isinstance(record, dict):
            raise UserError("is no JSON object", where=f"{path}:{number}")
        yield record


def finite(value: Any) -> Any:
    """A copy that JSON can hold: no NaN or infinity, no numpy scalars, plain lists and dicts."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
