"""Rows of Hugging Face datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_gemma_ft.data.files import NotHereError
from keras_gemma_ft.data.formats import Record, arrow_records
from keras_gemma_ft.data.sources import Stream
from keras_gemma_ft.errors import UserError

_BATCH = 256  # rows


@dataclass(frozen=True)
class HuggingFaceDataset:
    """A dataset on the hub, in a directory of `save_to_disk`, or in one with data files.

    Attributes:
        name: As the user wrote it.
        dataset: A directory, or ORG/NAME:CONFIG, the configuration optional.
        split: As `datasets` reads it: `train`, `train[:90%]`.
    """

    name: str
    dataset: str
    split: str

    def streams(self) -> Iterator[Stream]:
        yield Stream(self.name, "Hugging Face dataset", self._records())

    def fingerprint(self) -> str:
        """Of the rows."""
        digest = hashlib.sha256()
        with _told(self.name):
            for table in self._tables():
                for batch in table.combine_chunks().to_batches():
                    digest.update(batch.serialize())
        return digest.hexdigest()

    def _records(self) -> Generator[Record, None, None]:
        with _told(self.name):
            classes = self._classes()
            row = 0
            for table in self._tables():
                for record in arrow_records(table):
                    row += 1
                    if isinstance(record, dict):
                        record |= {
                            name: names[record[name]] if record[name] >= 0 else ""
                            for name, names in classes.items()
                            if name in record
                        }
                    yield f"{self.name}, row {row}", record

    def _classes(self) -> dict[str, list[str]]:
        """The names of the classes in columns that hold their numbers."""
        features = self._load().features
        return {name: feature.names for name, feature in features.items() if hasattr(feature, "names")}

    def _tables(self) -> Iterator[Any]:
        return self._load().with_format("arrow").iter(batch_size=_BATCH)

    def _load(self) -> Any:
        import datasets

        path, _, config = self.dataset.partition(":")
        if not Path(self.dataset).expanduser().is_dir():
            return datasets.load_dataset(path, config or None, split=self.split)
        folder = Path(self.dataset).expanduser()
        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(folder), split=self.split)
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            if self.split not in ("train", str(saved.split)):
                raise ValueError(f"it has no split {self.split!r}: it is a split itself")
            return saved
        if self.split not in saved:
            raise ValueError(f"it has no split {self.split!r}; there are: {', '.join(saved)}")
        return saved[self.split]


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise NotHereError(
            f"Hugging Face datasets cannot be imported ({error})",
            where=name,
            remedy='pip install "keras-gemma-ft[data]", or train on rows prepared elsewhere.',
        ) from error
    except Exception as error:  # the library raises anything, of the network and of file formats
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"the dataset cannot be read: {reason}",
            where=name,
            remedy="write hf:ORG/NAME:CONFIG#SPLIT, or hf:DIRECTORY#SPLIT.",
        ) from error
