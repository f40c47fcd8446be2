"""A callback list that leaves logs on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras


class LazyLogs(keras.callbacks.CallbackList):
    """Gives callbacks the logs of a training step as device arrays.

    Keras's own list turns them into numbers first, and so waits for every step before it dispatches the next.
    A callback here reads them when it wants to; a step late costs nothing.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback], model: keras.Model, steps: int) -> None:
        super().__init__(list(callbacks), add_history=True, model=model, epochs=1, steps=steps)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        for callback in self.callbacks:
            callback.on_train_batch_end(batch, logs=logs)
