"""Packed rows equal their examples apart: logits, each token's loss, and gradients."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from decoders import FLOAT32, VOCABULARY, distance, gradients, logits, random_adapters, tokens
from small_models import KINDS

ROWS, LENGTH = tokens().shape
SETTINGS = dataclasses.replace(FLOAT32, lora_scale=2.0)
# As 40 tokens are added up in another order.
TOLERANCE = 1e-5


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_logits(decoder, kind, seed):
    rows = conversations(seed)
    _, *together = packed(rows, padding_id=7)
    batches = apart(rows)
    alone = [logits(decoder(kind), *packed(batch, padding_id=0)[1:]) for batch in batches]
    found = logits(decoder(kind), *together)[together[2] > 0]
    assert distance(found, unpacked(batches, alone, rows)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_leak_would_be_seen(decoder, kind):
    _, token_ids, positions, segment_ids = packed(conversations(0), padding_id=7)
    sound = logits(decoder(kind), token_ids, positions, segment_ids)
    leaking = logits(decoder(kind), token_ids, positions, np.minimum(segment_ids, 1))
    late = logits(decoder(kind), token_ids, positions + (segment_ids == 2), segment_ids)
    running = logits(decoder(kind), token_ids, None, segment_ids)
    assert distance(leaking[segment_ids > 0], sound[segment_ids > 0]) > 100 * TOLERANCE
    # Rotation is relative: where a segment starts to count does not matter, beyond rounding.
    for shifted in (late, running):
        assert distance(shifted[segment_ids > 0], sound[segment_ids > 0]) < 10 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(decoder, kind):
    adapters = random_adapters(decoder(kind).config)
    rows = conversations(seed=5)
    mask, *together = packed(rows, padding_id=7)
    losses, _, expected = gradients(decoder(kind), mask, *together, settings=SETTINGS, adapters=adapters)
    batches, alone = apart(rows), []
    total = jax.tree.map(np.zeros_like, expected)
    for batch in batches:
        mask, *one_each = packed(batch, padding_id=0)
        found, _, gradient = gradients(decoder(kind), mask, *one_each, settings=SETTINGS, adapters=adapters)
        alone.append(found)
        total = jax.tree.map(np.add, total, gradient)
    assert (losses > 0).sum() > 20
    assert distance(losses[together[2] > 0], unpacked(batches, alone, rows)) < TOLERANCE
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, gradient), found in zip(paths, jax.tree.leaves(total), strict=True):
        assert distance(found, gradient) < 100 * TOLERANCE, path
