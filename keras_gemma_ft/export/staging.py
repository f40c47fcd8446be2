"""Writing a directory whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keras_gemma_ft.errors import UserError

# An export of ours can be replaced by another; a directory without it belongs to somebody else.
CERTIFICATE = "certificate.json"


@contextmanager
def staged(target: str | Path) -> Iterator[Path]:
    """Yields an empty directory beside `target` that takes its place when the block ends without an error.

    After an error nothing is left, and what `target` held before is untouched. An earlier export of ours, or
    an empty directory, is replaced.

    Raises:
        UserError: `target` holds files that are not an export of ours, or cannot be written.
    """
    target = Path(target).absolute()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that moving it is a rename and never a copy of many gigabytes.
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write there: {error.strerror}",
            where=str(target),
            remedy="choose a directory you may write to.",
        ) from error
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's 0700 would hide the export from everybody else
        previous = staging.with_name(f"{staging.name}.previous")
        if target.exists():
            target.rename(previous)
        staging.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path) -> None:
    """Refuses a target that holds somebody else's files, before any work is done for it.

    Raises:
        UserError: It is a file, or a directory with files that are not an export of ours.
    """
    if target.exists() and not target.is_dir():
        raise UserError(
            "this is a file", where=str(target), remedy="choose a directory that does not exist yet."
        )
    if target.is_dir() and any(target.iterdir()) and not (target / CERTIFICATE).is_file():
        raise UserError(
            "the directory holds files that are not an export of keras_gemma_ft",
            where=str(target),
            remedy="choose an empty or a new directory; nothing was written.",
        )
