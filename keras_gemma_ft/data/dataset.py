"""Prepared rows on disk, opened without reading them, and the batch of any step found from its number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from keras_gemma_ft.data.packing import PackedRows, positions_of
from keras_gemma_ft.errors import UserError

Batch = dict[str, np.ndarray]
"""`token_ids`, `positions`, `segment_ids` (int32) and `loss_mask` (bool), each [batch, length]."""

MANIFEST = "manifest.json"
# Open files: three a shard. Common systems allow a process 1,024.
_OPEN_SHARDS = 128


class PackedDataset:
    """Rows of one length, in shards, as `keras_gemma_ft.data.prepare` writes them.

    Epoch e visits every row once, in an order that `(seed, e)` gives. The last batch of an epoch is filled up
    with rows of padding, so that all epochs have equally many steps. So the batch of a step follows from the
    step's number alone. With 5 rows and a batch size of 2, for example

        [3, 0]  [4, 1]  [2, –]    [1, 2]  [0, 4]  [3, –]

        dataset = PackedDataset.open("run/data/train")
        dataset.batch(step=1200, batch_size=16, seed=0)["token_ids"]   # int32 [16, length]

    Attributes:
        manifest: What the rows were made from and how; see `prepare`.
        length: Tokens of a row.
    """

    def __init__(self, shards: Shards, manifest: dict[str, Any], length: int) -> None:
        self._shards = shards
        self._starts = np.concatenate([[0], np.cumsum(shards.sizes)]).astype(np.int64)
        self.manifest = manifest
        self.length = length

    @classmethod
    def open(cls, directory: str | Path) -> PackedDataset:
        """Opens what `prepare` wrote; reads the manifest only.

        Raises:
            UserError: The directory holds no prepared dataset.
        """
        directory = Path(directory)
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            names = [shard["name"] for shard in manifest["shards"]]
            sizes = [int(shard["rows"]) for shard in manifest["shards"]]
            length = int(manifest["length"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                "this is no prepared dataset",
                where=str(directory),
                remedy="make one with `keras-gemma-ft data prepare`.",
            ) from error
        return cls(_Files(directory, names, sizes), manifest, length)

    @classmethod
    def from_rows(cls, rows: PackedRows) -> PackedDataset:
        """A dataset of rows in memory."""
        return cls(_Memory(rows), {}, rows.token_ids.shape[1])

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers, as a batch. A number of -1 gives a row of padding."""
        shape = (len(indices), self.length)
        token_ids, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        loss_mask = np.zeros(shape, bool)
        for n, index in enumerate(np.asarray(indices, np.int64).tolist()):
            if index < 0:
                continue
            shard = int(np.searchsorted(self._starts, index, side="right")) - 1
            rows, row = self._shards.open(shard), index - int(self._starts[shard])
            token_ids[n], segment_ids[n] = rows.token_ids[row], rows.segment_ids[row]
            loss_mask[n] = rows.loss_mask[row]
        return {
            "token_ids": token_ids,
            "positions": positions_of(segment_ids),
            "segment_ids": segment_ids,
            "loss_mask": loss_mask,
        }

    def batch(
        self, step: int, batch_size: int, seed: int | None = 0, process_index: int = 0, process_count: int = 1
    ) -> Batch:
        """The batch of a step.

        Args:
            step: Number of the step, from 0 and through all epochs.
            batch_size: Rows of the batch, over all processes.
            seed: Which order; None is the order of the rows, for validation.
            process_index, process_count: Which of how many equal parts of the batch to read. The parts,
                one after the other, are the batch of a single process.

        Returns:
            `batch_size / process_count` rows.

        Raises:
            UserError: `batch_size` cannot be divided among the processes.
        """
        if batch_size % process_count:
            raise UserError(
                f"a batch of {batch_size} rows cannot be divided among {process_count} processes",
                where="train.batch_size",
                remedy=f"use a multiple of {process_count}.",
            )
        part = batch_size // process_count
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        places = place * batch_size + process_index * part + np.arange(part)
        present = places < len(self)
        indices = np.full(part, -1, np.int64)
        indices[present] = (
            places[present] if seed is None else _permutation(len(self), seed, epoch)[places[present]]
        )
        return self.rows(indices)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps in which every row comes once: rows / batch_size, rounded up."""
        return -(-len(self) // batch_size)


class Shards(Protocol):
    """Where rows come from: `sizes` rows in each shard."""

    sizes: list[int]

    def open(self, shard: int) -> PackedRows: ...


class _Memory:
    def __init__(self, rows: PackedRows) -> None:
        self.sizes = [len(rows.token_ids)]
        self._rows = rows

    def open(self, shard: int) -> PackedRows:
        return self._rows


class _Files:
    def __init__(self, directory: Path, names: list[str], sizes: list[int]) -> None:
        self.sizes = sizes
        self._directory = directory
        self._names = names
        self._opened = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def open(self, shard: int) -> PackedRows:
        return self._opened(shard)

    def _open(self, shard: int) -> PackedRows:
        name = self._names[shard]
        try:
            arrays = [
                np.load(self._directory / f"{name}.{array}.npy", mmap_mode="r")
                for array in PackedRows.__slots__
            ]
        except (OSError, EOFError, ValueError) as error:
            raise UserError(
                f"shard {name} of the prepared dataset cannot be read",
                where=str(self._directory),
                remedy="delete the directory and prepare the data again.",
            ) from error
        return PackedRows(*arrays)


def write_shard(directory: Path, name: str, rows: PackedRows) -> None:
    """Writes rows as `name.token_ids.npy` and so on, each to be memory-mapped."""
    for array in PackedRows.__slots__:
        np.save(directory / f"{name}.{array}.npy", getattr(rows, array))


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """An order of `size` rows. Sorting raw Philox numbers gives the same one under every version of numpy."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
