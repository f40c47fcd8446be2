"""The data chapter of a run: from the files that the config names to rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from keras_gemma_ft.data.dataset import MANIFEST, PackedDataset
from keras_gemma_ft.data.prepare import findings, prepare
from keras_gemma_ft.data.readers import conversations, fingerprints
from keras_gemma_ft.data.shards import Recipe
from keras_gemma_ft.data.template import Template, Variant
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.evaluate.files import read_json


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
    tokenizer = Tokenizer.from_preset(config.preset)
    template = Template(_variant(config.preset), thinking=data.thinking, train_on=data.train_on)
    recipe = Recipe(template, data.max_length, data.packing, data.truncation, config.seed)
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


def _variant(preset: str) -> Variant:
    """Which chat template the preset was trained with, told by its configuration alone: no weight is read.

    Raises:
        UserError: There is no such preset, or it is no Gemma 4.
    """
    from keras_gemma_ft.model.config import Gemma4Config
    from keras_gemma_ft.presets import resolve_preset

    stored = read_json(Path(resolve_preset(preset)) / "config.json")
    is_keras_hub = "registered_name" in stored
    config = Gemma4Config.from_keras_hub(stored["config"]) if is_keras_hub else Gemma4Config.from_hf(stored)
    return config.variant  # type: ignore[return-value]
