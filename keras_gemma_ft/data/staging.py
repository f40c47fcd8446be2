"""A directory that appears when all of it is written, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keras_gemma_ft.errors import UserError


@contextmanager
def staging(directory: Path, what: str) -> Iterator[Path]:
    """A place to write that becomes `directory` when the block succeeds, and goes away when it fails.

    Args:
        directory: Does not exist, or is empty.
        what: Is written, for the error.

    Raises:
        UserError: It cannot be written.
    """
    place = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        place.mkdir(parents=True)
        yield place
        if directory.exists():
            directory.rmdir()  # empty, as was checked
        place.rename(directory)
    except OSError as error:
        raise UserError(
            f"{what} cannot be written ({error.strerror or error})",
            where=str(directory),
            remedy="give a directory that can be written and has room.",
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
