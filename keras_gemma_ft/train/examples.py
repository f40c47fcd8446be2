"""The data chapter of a run: from the files that the config names to rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from keras_gemma_ft.data.dataset import MANIFEST, PackedDataset
from keras_gemma_ft.data.from_config import tokenizer_and_recipe
from keras_gemma_ft.data.prepare import findings, prepare
from keras_gemma_ft.data.readers import conversations, fingerprints
from keras_gemma_ft.json_files import read_json
from keras_gemma_ft.train import workdir as directory


@dataclass(frozen=True)
class Examples:
    """Rows ready for batches.

    Attributes:
        train, held_out: Rows of tokens.
        train_examples, held_out_examples: Conversations in them.
        facts: For the manifest; `sha256` identifies the rows.
    """

    train: PackedDataset
    held_out: PackedDataset
    train_examples: int
    held_out_examples: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def main(config: ConfigDict, workdir: str | Path) -> Examples:
    """Prepares the data of a run, so that `train` need not: a machine with the model may lack the sources.

    Args:
        config: As `validate` accepts it; `train` must get the same one.
        workdir: The run directory.

    Raises:
        UserError: As `prepare_examples` does, or the directory cannot be written or holds a run.
    """
    place = directory.check(workdir, resume=False)
    with directory.nothing_half_written(place):
        examples = prepare_examples(config, place / "data", print)
    for name, part in (("training", examples.train), ("held out", examples.held_out)):
        counts = part.manifest["counts"]
        print(
            f"{name}: {counts['examples']:,} of {counts['conversations']:,} conversations in "
            f"{counts['rows']:,} rows of {part.length:,} tokens, {part.manifest['efficiency']:.1%} full; "
            f"{counts['trained_tokens']:,} of {counts['tokens']:,} tokens are trained"
        )
    print(f"{place / 'data'}")
    return examples


def prepare_examples(config: ConfigDict, place: Path, tell: Callable[[str], None]) -> Examples:
    """Reads, holds out, encodes, masks and packs, into `place`/train and `place`/held_out.

    What is there already, of a run that is resumed, is used again if nothing has changed.

    Args:
        config: As `validate` accepts it.
        place: Where rows are written.
        tell: Given a line for each finding about the rows.

    Raises:
        UserError: A file, row or column is wrong, or nothing is left to train on.
    """
    data = config.data
    tokenizer, recipe = tokenizer_and_recipe(config)
    sources = fingerprints(config, known=_sources_of(place), tell=tell)
    parts = {}
    for name, rows in zip(("train", "held_out"), conversations(config, tell), strict=True):
        # Either part follows from all the files and from how they are divided.
        division = {"part": f"{name} of {data.eval_fraction} held out" if data.eval is None else name}
        parts[name] = prepare(rows, place / name, tokenizer, recipe, {**sources, **division}, data.on_error)
        for line in findings(parts[name].manifest):
            tell(f"{name.replace('_', '-')} data: {line}")
    counts = {name: part.manifest["counts"] for name, part in parts.items()}
    facts = {
        "files": sources,
        "sha256": "-".join(part.manifest["sha256"] for part in parts.values()),
        "counts": counts,
    }
    return Examples(
        parts["train"],
        parts["held_out"],
        counts["train"]["examples"],
        counts["held_out"]["examples"],
        facts,
    )


def _sources_of(place: Path) -> dict[str, str]:
    """Hashes of what was prepared there: a machine that only trains need not have the sources."""
    path = place / "train" / MANIFEST
    return read_json(path)["identity"]["sources"] if path.is_file() else {}
