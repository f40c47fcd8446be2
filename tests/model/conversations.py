"""Random conversations, packed into rows and apart."""

from typing import Any

import numpy as np
from decoders import VOCABULARY, tokens

ROWS, LENGTH = tokens().shape


def conversations(seed: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """For each row, examples as (token ids, loss mask), shorter and longer than the window of 8."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(ROWS):
        left, examples = LENGTH - int(rng.integers(0, 4)), []
        while left:
            count = min(left, int(rng.integers(1, 20)))
            examples.append((rng.integers(3, VOCABULARY, count, np.int32), rng.random(count) < 0.5))
            left -= count
        rows.append(examples)
    return rows


def packed(rows: list[list[tuple[np.ndarray, np.ndarray]]], padding_id: int) -> tuple[np.ndarray, ...]:
    """Mask, token ids, positions and segment ids, each [rows, length]."""
    mask = np.zeros((len(rows), LENGTH), bool)
    token_ids = np.full((len(rows), LENGTH), padding_id, np.int32)
    positions, segment_ids = np.zeros_like(token_ids), np.zeros_like(token_ids)
    for row, examples in enumerate(rows):
        start = 0
        for segment, (ids, supervised) in enumerate(examples, 1):
            span = slice(start, start + len(ids))
            token_ids[row, span], positions[row, span] = ids, np.arange(len(ids))
            segment_ids[row, span] = segment
            mask[row, span] = supervised & (np.arange(len(ids)) > 0)  # nothing predicts a first token
            start = span.stop
    return mask, token_ids, positions, segment_ids


def apart(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> list[list[list[tuple[np.ndarray, np.ndarray]]]]:
    """The same examples in rows of their own, as batches."""
    single = [[example] for examples in rows for example in examples]
    single += [[(np.zeros(0, np.int32), np.zeros(0, bool))]] * (-len(single) % ROWS)
    return [single[start : start + ROWS] for start in range(0, len(single), ROWS)]


def unpacked(batches: list[Any], values: list[np.ndarray], rows: list[Any]) -> np.ndarray:
    """The values of the examples' tokens, in the order in which they are packed."""
    found = [
        value[row, : len(examples[0][0])]
        for batch, value in zip(batches, values, strict=True)
        for row, examples in enumerate(batch)
    ]
    return np.concatenate(found)
