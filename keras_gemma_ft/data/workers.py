"""Work on rows in chunks, in this process or in several; results come in the order of the chunks.

A chunk is what a worker gets, whatever the number of workers: results do not depend on the machine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

from keras_gemma_ft.data.rows import Problem, Row
from keras_gemma_ft.errors import UserError

# About a million tokens of text a chunk, or enough for rows that are longer: the last rows of a chunk are not
# full, and this keeps them below one in a hundred.
_CHUNK_CHARACTERS = 4_000_000
_CHUNK_ROWS = 128
_CHARACTERS_PER_TOKEN = 4
_CHUNKS_WORTH_WORKERS = 3  # a process takes half a second to start, a chunk a quarter to encode

Result = TypeVar("Result")
Work = Callable[[list[Row], int], Result]
"""Called with a chunk and its number."""


class ChunkedWork:
    """Rows in chunks, and the workers for them.

    Args:
        rows: Read one by one; the first chunks at once.
        max_length: Tokens of a row.
        workers: Processes; 1 does all in this one. None: as many as there are CPUs, as soon as the input is
            large enough to gain from it. Processes are spawned, so a script that asks for them needs
            `if __name__ == "__main__":`.

    Raises:
        UserError: A row is at fault, or this is a worker process that begins the work once more.
    """

    def __init__(self, rows: Iterable[Row], max_length: int, workers: int | None = None) -> None:
        rest = _chunks(rows, max_length)
        first = list(islice(rest, _CHUNKS_WORTH_WORKERS))
        self._chunks = chain(first, rest)
        self._workers = _worker_count(workers, len(first))

    def results(self, start: Callable[[], Work[Result]]) -> Iterator[Result]:
        """What the work gives for each chunk.

        Args:
            start: Called once in each process, and can be pickled.
        """
        if self._workers > 1:
            yield from self._in_processes(start)
        else:
            work = start()
            for number, chunk in enumerate(self._chunks):
                yield work(chunk, number)

    def _in_processes(self, start: Callable[[], Work[Result]]) -> Iterator[Result]:
        # Spawned, because forking a process with JAX's threads in it can hang.
        pool = ProcessPoolExecutor(
            self._workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(start,),
        )
        pending: deque[Future[Result]] = deque()
        try:
            for number, chunk in enumerate(self._chunks):
                with _interrupts_held():  # it starts a process where none is idle
                    pending.append(pool.submit(_work, chunk, number))
                # One chunk waits for each worker: none idles, and memory stays bounded.
                if len(pending) > 2 * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died",
                remedy='start it under `if __name__ == "__main__":`, free memory, or use one worker.',
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which a terminal sends to all: this one stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: Work[Any] | None = None


def _start_worker(start: Callable[[], Work[Any]]) -> None:
    global _worker
    _worker = start()


def _work(chunk: list[Row], number: int) -> Any:
    assert _worker is not None, "the pool calls _start_worker first"
    return _worker(chunk, number)


def _chunks(rows: Iterable[Row], max_length: int) -> Iterator[list[Row]]:
    """Consecutive rows of about as much text each."""
    limit = max(_CHUNK_CHARACTERS, _CHUNK_ROWS * max_length * _CHARACTERS_PER_TOKEN)
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        if isinstance(row, Problem):
            characters += len(row.what)
        else:
            contents = (m.get("content") for m in row.messages if isinstance(m, dict))
            characters += sum(len(str(content)) for content in contents)
        if characters >= limit:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _worker_count(workers: int | None, chunks: int) -> int:
    """How many processes to use; `chunks` is how many there are, up to what makes processes worth while."""
    if workers is None:
        workers = (os.cpu_count() or 1) if chunks == _CHUNKS_WORTH_WORKERS else 1
    if workers > 1 and multiprocessing.parent_process() is not None:
        # A spawned process runs the script's top level first: without the guard it comes by here, too.
        raise UserError(
            "a worker process started the work once more",
            remedy='call it under `if __name__ == "__main__":`, or with workers=1.',
        )
    return workers
