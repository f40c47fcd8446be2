"""Where rows come from: files, TensorFlow datasets and Hugging Face datasets, by the names that a config has.

    train.jsonl    data/*.jsonl.gz    gs://bucket/train.parquet
    tfds:NAME/CONFIG:VERSION#SPLIT    the directory with datasets in data.data_dir
    hf:ORG/NAME:CONFIG#SPLIT          or hf:DIRECTORY#SPLIT

All but the name may be left out; the split is then `train`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from keras_gemma_ft.data import formats
from keras_gemma_ft.data.files import find_files, hash_files


@dataclass(frozen=True)
class Stream:
    """Rows of one kind.

    Attributes:
        name: A file, or a dataset.
        format: What it is, in words.
        records: Its rows in order.
    """

    name: str
    format: str
    records: Generator[formats.Record, None, None]


class Source(Protocol):
    """What one name of `data.train` or `data.eval` stands for."""

    @property
    def name(self) -> str:
        """As the user wrote it."""

    def streams(self) -> Iterator[Stream]:
        """Its rows, the same ones in the same order each time.

        Raises:
            NotHereError: It is not on this machine, or what reads it is not.
            UserError: It cannot be read.
        """

    def fingerprint(self) -> str:
        """A hash of its content; raises as `streams` does."""


@dataclass(frozen=True)
class Files:
    """The files that a path or a pattern fits.

    Attributes:
        name: The path or pattern.
        format: A key of `formats.READERS`; auto: as each file tells.
    """

    name: str
    format: str = "auto"

    def streams(self) -> Iterator[Stream]:
        for path in find_files(self.name):
            format, read = formats.READERS[formats.detect(path) if self.format == "auto" else self.format]
            yield Stream(path, format, read(path))

    def fingerprint(self) -> str:
        """Of the files' bytes in order: the same files under other names are the same."""
        return combined(hash_files(find_files(self.name)).values())


def find(names: str, format: str = "auto", data_dir: str | None = None) -> list[Source]:
    """The sources that names separated by commas stand for; nothing is opened yet.

    Args:
        names: See above.
        format: Of files; see `Files`.
        data_dir: Where TensorFlow datasets lie; None: where they do by default.
    """
    return [_source(name.strip(), format, data_dir) for name in names.split(",") if name.strip()]


def _source(name: str, format: str, data_dir: str | None) -> Source:
    scheme, _, rest = name.partition(":")
    if scheme not in ("tfds", "hf"):
        return Files(name, format)
    dataset, _, split = rest.partition("#")
    # The libraries behind them are heavy, or not installed.
    if scheme == "tfds":
        from keras_gemma_ft.data.tensorflow_datasets import TensorFlowDataset

        return TensorFlowDataset(name, dataset, split or "train", data_dir)
    from keras_gemma_ft.data.hugging_face import HuggingFaceDataset

    return HuggingFaceDataset(name, dataset, split or "train")


def combined(hashes: Iterable[str]) -> str:
    """One hash of several; of one, that one."""
    each = list(hashes)
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
