"""`Validation`: the held-out loss, exact over tokens, at set steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.train.answers import Answers
from keras_gemma_ft.train.batches import Batches
from keras_gemma_ft.train.callbacks.measurements import Measurements


class Validation(keras.callbacks.Callback):
    """Measures the held-out loss before the first step, every `every` steps and after the last.

    Args:
        held_out: Held-out batches.
        every: Steps between measurements.
        first_step, last_step: Of the run.
        measurements: Told to settle before, and given the records afterwards: the loss, and samples.
        answers: Gives samples of what the model answers, and the metric over its answers if it has one.
        metric: By which the best checkpoint is chosen: one of `best_metric.NAMES`.
        listeners: Called with (step, loss, value of the metric) after each measurement, the model's state in
            its variables.
    """

    def __init__(
        self,
        held_out: Batches,
        *,
        every: int,
        first_step: int,
        last_step: int,
        measurements: Measurements,
        answers: Answers | None = None,
        metric: str = "loss",
        listeners: tuple[Callable[[int, float, float], None], ...] = (),
    ) -> None:
        super().__init__()
        self._held_out = held_out
        self._every = every
        self._first_step = first_step
        self._last_step = last_step
        self._measurements = measurements
        self._answers = answers
        self._metric = metric
        self._listeners = listeners
        self.losses: dict[int, float] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        if self._first_step == 0:
            self.measure(0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self._first_step + batch + 1
        if step % self._every == 0 or step == self._last_step:
            self.measure(step)

    def measure(self, step: int) -> float:
        """Measures now, as that of `step`."""
        self._measurements.settle()
        self.model.jax_state_sync()
        loss, tokens = held_out_loss(self.model, self._held_out)
        self.losses[step] = loss
        samples, score = self._answers.samples() if self._answers is not None else ([], None)
        value = self._value(loss, score)
        record = {"step": step, "eval_loss": loss, "eval_tokens": tokens}
        self._measurements.write({**record, f"eval_{self._metric}": value})
        if samples:
            self._measurements.write({"step": step, "samples": samples})
        for listen in self._listeners:
            listen(step, loss, value)
        return loss

    def _value(self, loss: float, score: float | None) -> float:
        if self._metric == "loss":
            return loss
        if self._metric == "perplexity":
            return float(np.exp(loss))
        assert score is not None, "`fit` has made sure that there are answers"
        return score


def held_out_loss(model: keras.Model, held_out: Batches) -> tuple[float, int]:
    """Mean loss of all supervised tokens of the batches, and their number.

    Each batch's mean is weighted by its tokens, so the result does not depend on how rows fall into batches.

    Raises:
        UserError: The batches have no supervised token.
    """
    sums = _TokenSums()
    model.evaluate(held_out.feed(), verbose=0, callbacks=keras.callbacks.CallbackList([sums], model=model))
    if not sums.tokens:
        raise UserError(
            "the held-out rows have no token to learn from",
            where="data.eval",
            remedy="look at their loss mask: model turns must not be empty or cut off by data.max_length.",
        )
    return math.fsum(sums.losses) / sums.tokens, sums.tokens


class _TokenSums(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.tokens = 0

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        logs = logs or {}
        tokens = int(logs["tokens"])
        if tokens:  # the mean of no token is no number
            self.losses.append(float(logs["loss"]) * tokens)
            self.tokens += tokens
