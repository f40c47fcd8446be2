"""Feeds training: the batches of a dataset in order, made ready ahead of the device.

`tf_dataset` is the usual way; `iterate` gives the same batches on a machine without TensorFlow. Both start at
any step at once, because a batch follows from its number: that is all there is to resuming exactly.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_gemma_ft.data.dataset import Batch, PackedDataset

if TYPE_CHECKING:
    import tensorflow as tf

_DRIVERS = re.compile(rb"cudart_stub\.cc|before absl::InitializeLog")
_AHEAD = 4  # batches made ready; a batch is some hundred kilobytes


def iterate(
    dataset: PackedDataset,
    batch_size: int,
    seed: int | None = 0,
    start_step: int = 0,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The batches from `start_step` up to, not including, `stop_step` (None: without end).

    A thread reads ahead; an error in it is raised where the batch would have come. For one pass in order, as
    validation wants it: `seed=None, stop_step=dataset.steps_per_epoch(batch_size)`.
    """
    return _read_ahead(
        lambda step: dataset.batch(step, batch_size, seed, process_index, process_count),
        start_step,
        stop_step,
    )


def tf_dataset(
    dataset: PackedDataset,
    batch_size: int,
    seed: int | None = 0,
    start_step: int = 0,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> tf.data.Dataset:
    """The batches of `iterate` as a `tf.data.Dataset`, read in parallel and in order."""
    tf = tensorflow()
    shape = (batch_size // process_count, dataset.length)
    dtypes = {"token_ids": tf.int32, "positions": tf.int32, "segment_ids": tf.int32, "loss_mask": tf.bool}

    def read(step: np.int64) -> list[np.ndarray]:
        batch = dataset.batch(int(step), batch_size, seed, process_index, process_count)
        return [batch[name] for name in dtypes]

    def load(step: Any) -> dict[str, Any]:
        arrays = tf.numpy_function(read, [step], list(dtypes.values()))
        return {name: tf.ensure_shape(array, shape) for name, array in zip(dtypes, arrays, strict=True)}

    steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max if stop_step is None else stop_step)
    return steps.map(load, num_parallel_calls=2, deterministic=True).prefetch(_AHEAD)


def tensorflow() -> Any:
    """TensorFlow, without the lines about missing GPU drivers that its libraries write as they are loaded.

    Their level cannot be set from outside: they are written before any setting is read. What else is said on
    standard error meanwhile is said afterwards.
    """
    if "tensorflow" not in sys.modules:
        with _standard_error_without(_DRIVERS):
            import tensorflow  # noqa: F401
    return sys.modules["tensorflow"]


@contextlib.contextmanager
def _standard_error_without(lines: re.Pattern[bytes]) -> Iterator[None]:
    """Holds back what the process writes to standard error, and then writes all but some lines of it."""
    sys.stderr.flush()
    standard_error = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(standard_error, 2)
            os.close(standard_error)
            said.seek(0)
            for line in said:
                if not lines.search(line):
                    os.write(2, line)


def _read_ahead(read: Callable[[int], Batch], start: int, stop: int | None) -> Iterator[Batch]:
    ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=_AHEAD)
    abandoned = threading.Event()

    def put(item: Batch | Exception | None) -> None:
        while not abandoned.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        step = start
        try:
            while not abandoned.is_set() and (stop is None or step < stop):
                put(read(step))
                step += 1
            put(None)
        except Exception as error:  # raised again in the thread that asked for the batch
            put(error)

    threading.Thread(target=work, name="read-ahead", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        abandoned.set()
