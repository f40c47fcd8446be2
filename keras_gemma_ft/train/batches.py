"""The batches of a run, in an order that a step number alone determines, as Keras takes them."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import keras
import numpy as np

from keras_gemma_ft.data.dataset import Batch, PackedDataset


class Batches(keras.utils.PyDataset):
    """The batches from `first_step` to the last of a run, or those of one pass over held-out rows.

    Which rows make up a step is the dataset's matter: see `PackedDataset`. Because it depends on nothing but
    seed and step, a run that is resumed sees the batches that it would have seen.

    Args:
        dataset: Rows of tokens.
        batch_size: Rows of a step, over all processes.
        seed: Of the order; None: one pass in the given order, for held-out rows.
        epochs: Times over the rows.
        first_step: Steps that were made already.
        last_step: Ends there, if that is before the epochs end.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        batch_size: int,
        *,
        seed: int | None = None,
        epochs: int = 1,
        first_step: int = 0,
        last_step: int | None = None,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = dataset.steps_per_epoch(batch_size)
        planned = self.steps_per_epoch * epochs
        self.total_steps = min(planned, last_step) if last_step is not None else planned
        self.first_step = first_step

    @property
    def num_batches(self) -> int:
        return max(self.total_steps - self.first_step, 0)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch:
        return self._read(self.first_step + index, jax.process_index(), jax.process_count())

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def feed(self) -> Any:
        """What `fit` is given: tf.data, which reads ahead; without TensorFlow, this dataset itself."""
        if importlib.util.find_spec("tensorflow") is None:
            return self
        from keras_gemma_ft.data.pipeline import tensorflow, tf_dataset

        # TensorFlow would take the accelerator's memory for itself.
        for kind in ("GPU", "TPU"):
            tensorflow().config.set_visible_devices([], kind)
        span, part = (self.first_step, self.total_steps), (jax.process_index(), jax.process_count())
        return tf_dataset(self.dataset, self.batch_size, self.seed, *span, *part)

    def tokens(self, step: int) -> int:
        """Tokens of a step, over all processes, that are no padding."""
        return int(np.count_nonzero(self._read(step)["segment_ids"]))

    def fingerprint(self, step: int) -> str:
        """CRC-32 of the step's tokens and masks, for comparing what two runs saw."""
        batch = self._read(step)
        return f"{zlib.crc32(batch['loss_mask'].tobytes(), zlib.crc32(batch['token_ids'].tobytes())):08x}"

    def _read(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        return self.dataset.batch(step, self.batch_size, self.seed, process_index, process_count)
