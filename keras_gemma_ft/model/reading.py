"""Arrays on their way from files into memory: in one go, and ahead of the work on them.

A memory-mapped array that is read by touching it comes page by page, which takes a processor several times as
long as one call that reads it; and JAX copies once more what does not begin at a multiple of 64 bytes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from keras_gemma_ft.errors import UserError

Key = TypeVar("Key")

AHEAD = 256 * 2**20  # bytes that lie read; a disk gives about as many while a program compiles
_ALIGNMENT = 64


def ahead(items: Iterable[tuple[Key, Any]]) -> Iterator[tuple[Key, Any]]:
    """Keys with arrays, in their order. Those of numpy are read into memory while the caller works.

    What is no array of numpy, or larger than `AHEAD`, is passed on as it is.
    """
    with ThreadPoolExecutor(1, "reading") as thread:
        waiting: deque[tuple[Key, int, Future[np.ndarray]]] = deque()

        def done() -> tuple[Key, np.ndarray]:
            key, _, coming = waiting.popleft()
            return key, coming.result()

        for key, array in items:
            if isinstance(array, np.ndarray) and array.nbytes <= AHEAD:
                waiting.append((key, array.nbytes, thread.submit(in_memory, array)))
                while sum(size for _, size, _ in waiting) > AHEAD:
                    yield done()
            else:
                while waiting:
                    yield done()
                yield key, array
        while waiting:
            yield done()


def in_memory(array: np.ndarray) -> np.ndarray:
    """A copy of an array, which may be mapped from a file, that JAX takes over on a CPU without another.

    Raises:
        UserError: The file has become too short.
    """
    copy = aligned(array.shape, array.dtype)
    mapped = array
    while isinstance(mapped.base, np.memmap):
        mapped = mapped.base
    if not isinstance(mapped, np.memmap) or mapped.filename is None or not array.flags.c_contiguous:
        np.copyto(copy, array)
        return copy
    rest = copy.view(np.uint8).reshape(-1).data
    with open(mapped.filename, "rb", buffering=0) as file:
        file.seek(mapped.offset + array.ctypes.data - mapped.ctypes.data)
        while rest:
            count = file.readinto(rest)
            if not count:
                raise UserError(
                    f"ends {len(rest)} bytes before a weight does",
                    where=str(mapped.filename),
                    remedy="download the checkpoint again.",
                )
            rest = rest[count:]
    return copy


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of any values that begins where JAX wants it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
