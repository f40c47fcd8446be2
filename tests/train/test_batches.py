"""The order of rows: fixed by the seed, whole in each epoch, and the same from any step on."""

import numpy as np
from toy_model import rows

from keras_gemma_ft.train.batches import Batches


def test_each_epoch_has_every_row_once_and_an_order_of_its_own():
    batches = Batches(rows(10), 4, seed=7, epochs=3)
    assert (batches.steps_per_epoch, batches.total_steps, len(batches)) == (3, 9, 9)
    epochs = [np.concatenate([batches.indices(3 * epoch + step) for step in range(3)]) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(10))
    assert len({tuple(order) for order in epochs}) == 3


def test_the_order_is_golden():
    # Changing it makes every interrupted run go on with other batches: only with a note in the changelog.
    batches = Batches(rows(6), 6, seed=0, epochs=2)
    assert [batches.indices(step).tolist() for step in range(2)] == [[4, 0, 3, 5, 2, 1], [4, 1, 5, 3, 2, 0]]


def test_batches_from_a_step_on_are_those_of_the_whole_run():
    whole = list(Batches(rows(10), 4, seed=1, epochs=4))
    for first in (0, 1, 5, 11):
        rest = list(Batches(rows(10), 4, seed=1, epochs=4, first_step=first))
        assert len(rest) == len(whole) - first
        for ours, theirs in zip(rest, whole[first:], strict=True):
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])
    assert len(Batches(rows(10), 4, epochs=4, first_step=12)) == 0


def test_the_last_batch_is_filled_with_rows_that_do_not_count():
    data = rows(5)
    batches = Batches(data, 4)
    last = batches.batch(1)
    np.testing.assert_array_equal(last["token_ids"][0], data["token_ids"][4])
    assert all(value.shape[0] == 4 for value in last.values())
    assert not any(value[1:].any() for value in last.values())
    assert batches.tokens(1) == np.count_nonzero(data["segment_ids"][4])
    assert {name: value.dtype for name, value in last.items()} == {
        name: value.dtype for name, value in data.items()
    }


def test_a_run_can_end_before_its_epochs_do():
    assert len(Batches(rows(10), 4, epochs=3, last_step=5)) == 5
    assert len(Batches(rows(10), 4, epochs=3, last_step=50)) == 9


def test_the_fingerprint_tells_batches_apart():
    batches = Batches(rows(10), 2, seed=0, epochs=2)
    assert len({batches.fingerprint(step) for step in range(5)}) == 5
    assert batches.fingerprint(3) == Batches(rows(10), 2, seed=0, first_step=2).fingerprint(3)
