"""The data chapter of a run: from the files that the config names to rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keras_gemma_ft.data.dataset import PackedDataset


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
