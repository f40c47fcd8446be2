"""Stopping in order: the first signal ends the run after its step, a second one at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import keras


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and has saved what it needs to go on.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class StopOnSignal(keras.callbacks.Callback):
    """Within its context SIGINT (Ctrl-C) and SIGTERM make `fit` end after the step under way.

    Attributes:
        received: Number of the signal, or None.
    """

    def __init__(self, tell: Any = print) -> None:
        super().__init__()
        self.received: int | None = None
        self._tell = tell
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {
                number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.received is not None:
            self.model.stop_training = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self._tell("Stopping after this step, then saving; once more to stop at once.")
