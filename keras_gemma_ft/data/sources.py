"""Where rows come from: files by path or pattern, here or in a bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from etils import epath

from keras_gemma_ft.data import formats
from keras_gemma_ft.data.files import open_bytes
from keras_gemma_ft.errors import UserError


@dataclass(frozen=True)
class File:
    """One file of rows.

    Attributes:
        name: Its path, as the user gave it.
        format: A key of `formats.READERS`, or auto.
    """

    name: str
    format: str = "auto"

    def records(self) -> tuple[str, Iterator[formats.Record]]:
        """What the file is, in words, and its rows."""
        key = formats.detect(self.name) if self.format == "auto" else self.format
        name, reader = formats.READERS[key]
        return name, reader(self.name)

    def fingerprint(self) -> str:
        """SHA-256 of the bytes, unpacked."""
        with open_bytes(self.name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def find(data: str, format: str = "auto") -> list[File]:
    """The sources that a config's `data.train` or `data.eval` names, separated by commas.

    Raises:
        UserError: A pattern fits no file.
    """
    names = [name.strip() for name in data.split(",") if name.strip()]
    return [File(path, format) for name in names for path in _paths(name)]


def _paths(name: str) -> list[str]:
    if not any(character in name for character in "*?["):
        return [name]
    folder, _, pattern = name.rpartition("/")
    paths = sorted(str(path) for path in epath.Path(folder or ".").glob(pattern))
    if not paths:
        raise UserError("no file fits the pattern", where=name, remedy="check the path.")
    return paths
