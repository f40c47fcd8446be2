"""Files of rows as bytes, here or in a bucket, compressed or not."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from etils import epath

from keras_gemma_ft.errors import UserError

_GZIP = b"\x1f\x8b"
_BUFFER = 1 << 20  # bytes


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it is gzipped (which its first bytes tell, not its name).

    Raises:
        UserError: There is no such file, or it cannot be read to its end.
    """
    try:
        with epath.Path(path).open("rb") as raw:
            # Files of buckets have no peek().
            buffered = io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER)
            if buffered.peek(2)[:2] == _GZIP:
                buffered = io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BUFFER)  # type: ignore[arg-type]
            yield cast(BinaryIO, buffered)
    except FileNotFoundError as error:
        raise UserError("there is no such file", where=path, remedy="check the path.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"the compressed file is damaged ({error})",
            where=path,
            remedy="compress it again, or copy it anew.",
        ) from error
    except OSError as error:
        raise UserError(
            f"the file cannot be read ({error.strerror or error})", where=path, remedy="check the path."
        ) from error
