"""Rows of TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from keras_gemma_ft.data.files import NotHereError, hash_files
from keras_gemma_ft.data.formats import Record
from keras_gemma_ft.data.sources import Stream, combined
from keras_gemma_ft.errors import UserError


@dataclass(frozen=True)
class TensorFlowDataset:
    """A dataset by name; see `sources.Source`.

    Attributes:
        name: As the user wrote it.
        dataset: NAME/CONFIG:VERSION, the last two optional.
        split: As TFDS reads it: `train`, `train[:90%]`.
        data_dir: Where it lies, or is put if it is not there yet.
    """

    name: str
    dataset: str
    split: str
    data_dir: str | None

    def streams(self) -> Iterator[Stream]:
        yield Stream(self.name, "TensorFlow dataset", self._records())

    def fingerprint(self) -> str:
        """Of the files of the split, and of which part of them it is."""
        with _told(self.name):
            paths = [str(path) for path in self._builder().info.splits[self.split].filepaths]
        return combined([*hash_files(paths).values(), self.split])

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder(self.dataset, data_dir=self.data_dir)
        if not builder.is_prepared():
            builder.download_and_prepare()
        return builder

    def _records(self) -> Generator[Record, None, None]:
        with _told(self.name):
            import tensorflow_datasets as tfds

            builder = self._builder()
            features = builder.info.features
            rows = tfds.as_numpy(builder.as_dataset(split=self.split, shuffle_files=False))
            for number, row in enumerate(rows, 1):
                yield f"{self.name}, row {number}", _record(features, row)


def _record(features: Any, row: Any) -> dict[str, Any] | UserError:
    try:
        return plain(features, row)
    except UnicodeDecodeError:
        return UserError("the text is not UTF-8", remedy="correct the dataset, or set data.on_error to skip.")


def plain(feature: Any, value: Any) -> Any:
    """A value of TFDS as JSON has it: texts for bytes and classes, a list of objects for a sequence."""
    import tensorflow_datasets as tfds

    kinds = tfds.features
    if isinstance(feature, kinds.FeaturesDict):
        return {name: plain(feature[name], value[name]) for name in feature}
    if isinstance(feature, kinds.ClassLabel):
        return feature.int2str(int(value)) if value >= 0 else ""  # -1: not known
    if isinstance(feature, kinds.Dataset):
        return [plain(feature.feature, item) for item in value]
    if isinstance(feature, kinds.Sequence):
        inner = feature.feature
        if isinstance(inner, kinds.FeaturesDict):  # kept as an object of lists
            columns = {name: plain(kinds.Sequence(inner[name]), value[name]) for name in inner}
            return [dict(zip(columns, item, strict=True)) for item in zip(*columns.values(), strict=True)]
        return [plain(inner, item) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if hasattr(value, "tolist") else value


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise NotHereError(
            f"TensorFlow Datasets cannot be imported ({error})",
            where=name,
            remedy="pip install tensorflow tensorflow-datasets, or train on rows prepared elsewhere.",
        ) from error
    except Exception as error:  # TFDS raises anything, AssertionError among it
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"the dataset cannot be read: {reason}",
            where=name,
            remedy="write tfds:NAME/CONFIG:VERSION#SPLIT, and its directory in data.data_dir.",
        ) from error
