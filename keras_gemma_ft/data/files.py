"""Files of rows as bytes, here or in a bucket, compressed or not."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from etils import epath

from keras_gemma_ft.errors import UserError

_GZIP = b"\x1f\x8b"
_BUFFER = 1 << 20  # bytes


class NotHereError(UserError):
    """What the user named is not on this machine, or nothing on it can open it."""


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it is gzipped (which its first bytes tell, not its name).

    Raises:
        NotHereError: There is no such file.
        UserError: It cannot be read to its end.
    """
    with _open(path) as raw:
        buffered = io.BufferedReader(raw, _BUFFER)
        if buffered.peek(2)[:2] == _GZIP:
            buffered = io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BUFFER)  # type: ignore[arg-type]
        yield cast(BinaryIO, buffered)


def find_files(pattern: str) -> list[str]:
    """The files that a path with `*`, `?` or `[…]` fits, in order; a path without them is itself.

    Raises:
        NotHereError: It fits none.
    """
    if not any(character in pattern for character in "*?["):
        return [pattern]
    folder, _, rest = pattern.rpartition("/")
    while any(character in folder for character in "*?["):
        folder, _, last = folder.rpartition("/")
        rest = f"{last}/{rest}"
    root = folder or ("/" if pattern.startswith("/") else ".")
    if "**" in rest:
        raise UserError("a pattern may not hold **", where=pattern, remedy="write a * for each folder.")
    with _told(pattern), _os_errors():
        found = sorted(str(path) for path in epath.Path(root).glob(rest))
    if not found:
        raise NotHereError("no file fits the pattern", where=pattern, remedy="check the path.")
    return found


def hash_files(paths: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of files by path.

    Raises:
        NotHereError: There is no such file.
        UserError: It cannot be read.
    """
    hashes = {}
    for path in map(str, paths):
        with _open(path) as raw:
            hashes[path] = hashlib.file_digest(cast(Any, raw), "sha256").hexdigest()
    return hashes


@contextmanager
def _open(path: str) -> Iterator[io.RawIOBase]:
    with _told(path), epath.Path(path).open("rb") as file:
        yield cast(io.RawIOBase, file) if hasattr(file, "readinto") else _Remote(file)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What goes wrong inside with a file, as an error for the user."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotHereError("there is no such file", where=path, remedy="check the path.") from error
    except IsADirectoryError as error:
        raise UserError(
            "is a directory",
            where=path,
            remedy=f"write {path}/*.jsonl, or hf:{path} for a Hugging Face dataset.",
        ) from error
    except ImportError as error:
        raise NotHereError(
            f"nothing is installed that reads such paths ({error})",
            where=path,
            remedy="pip install tensorflow, or copy the files here.",
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"the compressed file is damaged ({error})",
            where=path,
            remedy="compress it again, or copy it anew.",
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or str(error).splitlines()[0]})",
            where=path,
            remedy="check the path.",
        ) from error


@contextmanager
def _os_errors() -> Iterator[None]:
    """Errors of a bucket's file system as those of the operating system."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # TensorFlow has its own classes, which this must not import
        is_missing = type(error).__name__ == "NotFoundError"
        raise (FileNotFoundError if is_missing else OSError)(str(error)) from error


class _Remote(io.RawIOBase):
    """A file of TensorFlow's file systems, which know neither `readinto` nor OSError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _os_errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
