"""`Measurements`: what each step did, read a step late and given to whoever records it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras

from keras_gemma_ft.train.batches import Batches

Record = dict[str, Any]


class Writer(Protocol):
    """Records measurements: the terminal, a file, TensorBoard."""

    def write(self, record: Record) -> None:
        """One record: `step`, and some of the fields that `docs/training.md` lists."""

    def close(self) -> None:
        """Ends it; nothing is written afterwards."""


@dataclass
class _Step:
    """One that was dispatched and is not recorded yet; `ended` is None while nobody saw it end."""

    number: int
    logs: dict[str, Any]
    ended: float | None = None

    def is_there(self) -> bool:
        """Whether its loss can be read without waiting for the device."""
        return bool(getattr(self.logs.get("loss"), "is_ready", lambda: True)())


class Measurements(keras.callbacks.Callback):
    """One record for each step; the device never waits for it.

    Step n is read when step n + 1 has been dispatched, so the device has work while the host reads. A step's
    time is that between the end of the one before and its own. It ended when its loss was first seen to be
    there: as its dispatch returned (so it often is on a CPU), as the next step began, or when it was read.
    One that ended while the next was dispatched, which ended by then, too, is taken to have ended halfway.

    Args:
        batches: The run's batches, for tokens and fingerprints.
        writers: Where records go.
        learning_rate_at: Learning rate of a step counted from 0.
        tokens_at_peak: Tokens a second that the devices would train if they did nothing but the matrix
            products that training needs, at their peak rate. What is reached of it is recorded as `mfu`.
    """

    def __init__(
        self,
        batches: Batches,
        writers: Sequence[Writer],
        learning_rate_at: Callable[[int], float],
        tokens_at_peak: float | None = None,
    ) -> None:
        super().__init__()
        self._batches = batches
        self._writers = writers
        self._learning_rate_at = learning_rate_at
        self._tokens_at_peak = tokens_at_peak
        self._unread: _Step | None = None
        self._clock: float | None = None
        self._began = 0.0
        self.tokens = 0
        self.seconds = 0.0
        self.compile_seconds: float | None = None

    def write(self, record: Record) -> None:
        """Gives a record to every writer."""
        for writer in self._writers:
            writer.write(record)

    def settle(self) -> None:
        """Reads what is unread and stops the clock: called before anything else takes the device's time."""
        self._read()
        self._clock = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._began = time.perf_counter()
        if self._unread is not None and self._unread.ended is None and self._unread.is_there():
            self._unread.ended = self._began
        if self._clock is None and self._unread is None and self.compile_seconds is not None:
            self._clock = self._began

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        dispatched = time.perf_counter()
        if self.compile_seconds is None:
            # The first call returns when the step is compiled; running it is not waited for.
            self.compile_seconds = dispatched - self._began
            self.write({"step": self._batches.first_step, "compile_seconds": round(self.compile_seconds, 3)})
        step = _Step(self._batches.first_step + batch, logs or {})
        if step.is_there():
            step.ended = dispatched
            if self._unread is not None and self._unread.ended is None:
                self._unread.ended = (self._began + dispatched) / 2
        self._read()
        self._unread = step

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.settle()

    def _read(self) -> None:
        if self._unread is None:
            return
        step, logs, ended = self._unread.number, self._unread.logs, self._unread.ended
        self._unread = None
        losses: Record = {name: float(logs[name]) for name in ("loss", "grad_norm") if name in logs}
        if ended is None:
            ended = time.perf_counter()
        tokens = self._batches.tokens(step)
        record: Record = {
            "step": step + 1,
            "epoch": round((step + 1) / self._batches.steps_per_epoch, 4),
            **losses,
            "learning_rate": self._learning_rate_at(step),
            "tokens": tokens,
        }
        if "tokens" in logs:
            record["supervised_tokens"] = int(logs["tokens"])
        if self._clock is not None and ended > self._clock:
            seconds = ended - self._clock
            record["seconds"] = round(seconds, 4)
            record["tokens_per_second"] = round(tokens / seconds, 1)
            if self._tokens_at_peak is not None:
                record["mfu"] = round(tokens / seconds / self._tokens_at_peak, 4)
            self.tokens += tokens
            self.seconds += seconds
        self._clock = ended
        record["batch"] = self._batches.fingerprint(step)
        self.write(record)
