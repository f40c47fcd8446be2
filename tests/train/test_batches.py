"""A run's batches: the same from any step on, the same with and without tf.data."""

import numpy as np
import pytest
from toy_model import rows

from keras_gemma_ft.train.batches import Batches


def assert_equal_batches(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in other:
            assert np.asarray(mine[name]).dtype == other[name].dtype
            np.testing.assert_array_equal(mine[name], other[name])


def test_batches_from_a_step_on_are_those_of_the_whole_run():
    whole = list(Batches(rows(10), 4, seed=1, epochs=4))
    assert len(whole) == 12
    for first in (0, 1, 5, 11):
        assert_equal_batches(Batches(rows(10), 4, seed=1, epochs=4, first_step=first), whole[first:])
    assert len(Batches(rows(10), 4, seed=1, epochs=4, first_step=12)) == 0
    other = list(Batches(rows(10), 4, seed=2, epochs=4))
    assert any((a["token_ids"] != b["token_ids"]).any() for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("seed", [3, None])
def test_the_feed_gives_the_same_batches_with_and_without_tensorflow(seed, monkeypatch):
    batches = Batches(rows(10), 4, seed=seed, epochs=2 if seed else 1, first_step=2 if seed else 0)
    fed = batches.feed()
    assert fed is not batches
    assert fed.cardinality().numpy() == len(batches)
    assert_equal_batches(list(fed.as_numpy_iterator()), list(batches))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert batches.feed() is batches


def test_held_out_rows_come_once_and_padding_does_not_count():
    data = rows(5)
    batches = Batches(data, 4)
    assert len(batches) == 2
    last = batches[1]
    assert not any(value[1:].any() for value in last.values())
    assert batches.tokens(0) + batches.tokens(1) == np.count_nonzero(data.rows(range(5))["segment_ids"])


def test_a_run_can_end_before_its_epochs_do():
    assert len(Batches(rows(10), 4, seed=0, epochs=3, last_step=5)) == 5
    assert len(Batches(rows(10), 4, seed=0, epochs=3, last_step=50)) == 9


def test_the_fingerprint_tells_batches_apart():
    batches = Batches(rows(10), 2, seed=0)
    assert len({batches.fingerprint(step) for step in range(5)}) == 5
    assert batches.fingerprint(3) == Batches(rows(10), 2, seed=0, first_step=2).fingerprint(3)
