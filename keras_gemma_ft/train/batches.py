"""Rows of tokens to batches, in an order that a step number alone determines."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import keras
import numpy as np

Batch = dict[str, np.ndarray]


class Batches(keras.utils.PyDataset):
    """The batches from `first_step` to the last of a run, as one Keras dataset; needs no TensorFlow.

    Epoch e visits the rows in the order of a permutation drawn from (seed, e); step s is rows
    [s·B, (s+1)·B) of its epoch. So a run that is resumed sees the batches that it would have seen. With 5
    rows, `batch_size` 2 and 2 epochs there are 6 steps, for example

        [3, 0]  [4, 1]  [2, –]    [1, 2]  [0, 4]  [3, –]

    where – is an empty row (all zero: segment 0, no loss), which fills up the last batch of an epoch.

    Args:
        rows: `token_ids`, `positions`, `segment_ids` (int32) and `loss_mask` (bool), each [rows, length].
        batch_size: Rows of a step.
        seed: Of the order; None: in the given order, as for held-out data.
        epochs: Times over the rows.
        first_step: Steps that were made already.
        last_step: Ends there, if that is before the epochs end.
    """

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        batch_size: int,
        *,
        seed: int | None = None,
        epochs: int = 1,
        first_step: int = 0,
        last_step: int | None = None,
    ) -> None:
        super().__init__()
        self.rows = dict(rows)
        self.batch_size = batch_size
        self.seed = seed
        self.count = len(self.rows["token_ids"])
        self.steps_per_epoch = -(-self.count // batch_size)
        planned = self.steps_per_epoch * epochs
        self.total_steps = min(planned, last_step) if last_step is not None else planned
        self.first_step = first_step
        # Tokens of each row that are no padding: what throughput counts.
        self._tokens = np.count_nonzero(self.rows["segment_ids"], axis=1)
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def num_batches(self) -> int:
        return max(self.total_steps - self.first_step, 0)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        return self.batch(self.first_step + index)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def indices(self, step: int) -> np.ndarray:
        """Which rows make up a step: int [at most batch_size]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = np.arange(self.count)
            if self.seed is not None:
                # Philox gives the same numbers on every platform and numpy version.
                bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
                order = np.random.Generator(bits).permutation(self.count)
            self._order = (epoch, order)
        return self._order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from the start of the run: arrays [batch_size, length]."""
        chosen = self.indices(step)
        missing = self.batch_size - len(chosen)
        return {
            name: np.pad(values[chosen], ((0, missing), (0, 0))) if missing else values[chosen]
            for name, values in self.rows.items()
        }

    def tokens(self, step: int) -> int:
        """Tokens of a step that are no padding."""
        return int(self._tokens[self.indices(step)].sum())

    def fingerprint(self, step: int) -> str:
        """CRC-32 of the step's tokens and masks, for comparing what two runs saw."""
        batch = self.batch(step)
        return f"{zlib.crc32(batch['loss_mask'].tobytes(), zlib.crc32(batch['token_ids'].tobytes())):08x}"
