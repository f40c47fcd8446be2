"""Packing: the literal example, the plain reference, efficiency, nothing lost or mixed up."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_gemma_ft.data.encoding import EncodedBatch
from keras_gemma_ft.data.packing import best_fit, best_fit_reference, fill_rows, positions_of


def _batch(lengths: list[int], seed: int = 0) -> EncodedBatch:
    """Examples of random tokens that start with 2."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    token_ids = rng.integers(3, 100, offsets[-1]).astype(np.int32)
    loss_mask = rng.random(offsets[-1]) < 0.5
    token_ids[offsets[:-1]] = 2
    loss_mask[offsets[:-1]] = False
    return EncodedBatch(token_ids, loss_mask, offsets, np.zeros(len(lengths), np.int64))


def test_the_example_of_the_documentation():
    ids = [2, 11, 12, 13, 14, 2, 21, 22, 23, 2, 31, 32, 2, 41]
    offsets = np.array([0, 5, 9, 12, 14])
    batch = EncodedBatch(np.array(ids, np.int32), np.array(ids) > 2, offsets, np.zeros(4, np.int64))
    row_of = best_fit(batch.lengths, 8)
    assert row_of.tolist() == [0, 1, 0, 1]
    rows = fill_rows(batch, row_of, 8)
    assert rows.token_ids.tolist() == [[2, 11, 12, 13, 14, 2, 31, 32], [2, 21, 22, 23, 2, 41, 0, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0, 0]]
    assert positions_of(rows.segment_ids).tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert (rows.loss_mask == (rows.token_ids > 2)).all()
    assert rows.token_ids.dtype == positions_of(rows.segment_ids).dtype == np.int32


@given(st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=200)
def test_best_fit_equals_its_plain_reference(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), int)
    np.testing.assert_array_equal(best_fit(lengths, capacity), best_fit_reference(lengths, capacity))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("packing", [True, False])
def test_every_example_is_in_one_row_whole(seed, packing):
    rng = np.random.default_rng(seed)
    batch = _batch(rng.integers(1, 33, 100).tolist(), seed)
    row_of = best_fit(batch.lengths, 32) if packing else np.arange(100)
    rows = fill_rows(batch, row_of, 32)
    positions = positions_of(rows.segment_ids)
    for example in range(len(batch)):
        row = row_of[example]
        segment = 1 + int((row_of[:example] == row).sum())
        at = rows.segment_ids[row] == segment
        span = slice(batch.offsets[example], batch.offsets[example + 1])
        assert (np.diff(np.flatnonzero(at)) == 1).all()
        np.testing.assert_array_equal(rows.token_ids[row][at], batch.token_ids[span])
        np.testing.assert_array_equal(rows.loss_mask[row][at], batch.loss_mask[span])
        np.testing.assert_array_equal(positions[row][at], np.arange(at.sum()))
    assert (rows.segment_ids > 0).sum() == len(batch.token_ids)
    assert not rows.loss_mask[rows.segment_ids == 0].any()


def test_efficiency_and_speed_on_lengths_of_real_conversations():
    """Log-normal lengths as of oasst1 threads: median about 300 tokens, a tenth longer than 1,000."""
    rng = np.random.default_rng(0)
    for capacity, fewest in ((2048, 0.99), (1024, 0.97)):
        lengths = np.clip(rng.lognormal(5.7, 0.95, 10_000).astype(int), 8, capacity)
        row_of = best_fit(lengths, capacity)
        assert lengths.sum() / ((row_of.max() + 1) * capacity) >= fewest
    start = time.perf_counter()
    best_fit(np.clip(rng.lognormal(5.7, 0.95, 200_000).astype(int), 8, 2048), 2048)
    assert time.perf_counter() - start < 5  # 0.1 s on an idle core


def test_no_examples():
    rows = fill_rows(_batch([]), best_fit(np.zeros(0, int), 8), 8)
    assert rows.token_ids.shape == rows.segment_ids.shape == rows.loss_mask.shape == (0, 8)


def test_lengths_that_fit_no_row():
    for pack in (best_fit, best_fit_reference):
        with pytest.raises(ValueError, match="between 1 and 8"):
            pack(np.array([3, 9]), 8)
        with pytest.raises(ValueError, match="between 1 and 8"):
            pack(np.array([0]), 8)
