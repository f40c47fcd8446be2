"""The data chapter of a run: from the files that the config names to rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Examples:
    """Rows ready for batches.

    Attributes:
        train, held_out: `token_ids`, `positions`, `segment_ids` (int32) and `loss_mask` (bool), each
            [rows, length].
        train_examples, held_out_examples: Conversations in them.
        facts: For the manifest; `sha256` identifies the rows.
    """

    train: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    train_examples: int
    held_out_examples: int
    facts: Mapping[str, Any] = field(default_factory=dict)
