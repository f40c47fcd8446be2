"""Batches by step number, over processes, from disk, with and without TensorFlow."""

import os
import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest

from keras_gemma_ft.data import pipeline
from keras_gemma_ft.data.dataset import PackedDataset
from keras_gemma_ft.data.packing import PackedRows
from keras_gemma_ft.data.pipeline import iterate, tf_dataset
from keras_gemma_ft.errors import UserError

LENGTH = 6


def _dataset(rows: int) -> PackedDataset:
    """Row n holds n + 1 everywhere, two segments and one token of padding."""
    token_ids = np.repeat(np.arange(1, rows + 1, dtype=np.int32)[:, None], LENGTH, axis=1)
    segment_ids = np.tile(np.array([1, 1, 1, 2, 2, 0], np.uint16), (rows, 1))
    return PackedDataset.from_rows(PackedRows(token_ids, segment_ids, segment_ids == 2))


def _rows(batch) -> list[int]:
    return (batch["token_ids"][:, 0] - 1).tolist()


def _assert_equal(ours, theirs):
    assert list(ours) == list(theirs) == ["token_ids", "positions", "segment_ids", "loss_mask"]
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_batch_is_what_the_model_takes():
    batch = _dataset(5).batch(0, 2)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "token_ids": (np.int32, (2, 6)),
        "positions": (np.int32, (2, 6)),
        "segment_ids": (np.int32, (2, 6)),
        "loss_mask": (bool, (2, 6)),
    }
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 1)])
def test_every_epoch_has_every_row_once(rows, batch_size):
    dataset = _dataset(rows)
    steps = dataset.steps_per_epoch(batch_size)
    assert steps == {10: 3, 7: 1, 3: 1, 1: 1}[rows]

    def epoch(number: int, seed: int) -> list[int]:
        return [
            row
            for step in range(steps)
            for row in _rows(dataset.batch(number * steps + step, batch_size, seed))
        ]

    for number in range(3):
        order = epoch(number, seed=3)
        assert sorted(order[:rows]) == list(range(rows))
        assert order[rows:] == [-1] * (steps * batch_size - rows)  # rows of padding, at the end
    if rows == 10:
        assert epoch(0, seed=3) != epoch(1, seed=3)
        assert epoch(0, seed=3) != epoch(0, seed=4)


def test_order_is_the_same_on_every_machine():
    """Golden: changing it moves the data position of every checkpoint, so resumed runs would repeat rows."""
    assert _rows(_dataset(10).batch(0, 10, seed=1)) == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]


def test_processes_share_a_batch():
    dataset = _dataset(10)
    whole = dataset.batch(7, 6, seed=2)
    parts = [dataset.batch(7, 6, 2, process_index=n, process_count=3) for n in range(3)]
    _assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})
    with pytest.raises(UserError, match="multiple of 4"):
        dataset.batch(0, 6, process_count=4)


def test_one_pass_in_order():
    def one_pass(**arguments):
        return list(iterate(_dataset(5), 2, seed=None, stop_step=3, **arguments))

    batches = one_pass()
    assert [_rows(batch) for batch in batches] == [[0, 1], [2, 3], [4, -1]]
    assert not batches[-1]["segment_ids"][1].any()
    assert not batches[-1]["loss_mask"][1].any()
    parts = [[_rows(batch) for batch in one_pass(process_index=n, process_count=2)] for n in range(2)]
    assert parts == [[[0], [2], [4]], [[1], [3], [-1]]]


def test_resuming_gives_the_same_batches():
    dataset = _dataset(10)
    straight = list(iterate(dataset, 3, seed=5, stop_step=9))
    resumed = list(iterate(dataset, 3, seed=5, start_step=4, stop_step=9))
    assert len(straight) == 9
    for ours, theirs in zip(straight[4:], resumed, strict=True):
        _assert_equal(ours, theirs)


def test_abandoned_iterators_end_their_thread():
    iterator = iterate(_dataset(10), 2)
    assert len(list(islice(iterator, 3))) == 3
    (thread,) = [t for t in threading.enumerate() if t.name == "read-ahead"]
    iterator.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_errors_of_the_reading_thread_arrive():
    with pytest.raises(UserError, match="multiple of 4"):
        next(iterate(_dataset(10), 6, process_count=4))


def test_tensorflow_gives_identical_batches():
    dataset = _dataset(23)
    for arguments in (
        {"seed": 5, "stop_step": 12},
        {"seed": 5, "start_step": 7, "stop_step": 12},
        {"seed": 1, "stop_step": 4, "process_index": 1, "process_count": 2},
        {"seed": None, "stop_step": 6},
    ):
        ours = list(iterate(dataset, 4, **arguments))
        theirs = list(tf_dataset(dataset, 4, **arguments).as_numpy_iterator())
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            _assert_equal(a, b)
    endless = tf_dataset(dataset, 4)
    assert endless.element_spec["token_ids"].shape == (4, LENGTH)
    assert len(list(endless.take(30))) == 30


def test_nothing_here_imports_tensorflow():
    code = (
        "import sys, keras_gemma_ft.data.pipeline, keras_gemma_ft.data;"
        "heavy = {'tensorflow', 'keras', 'jax', 'torch', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_lines_about_drivers_are_held_back(capfd):
    said = "W: about NumPy\nI0000 cudart_stub.cc:31] Could not find cuda drivers\nlast"
    with pytest.raises(ValueError, match="no"), pipeline._standard_error_without(pipeline._DRIVERS):
        os.write(2, said.encode())
        os.write(2, b" words\n")
        raise ValueError("no")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "W: about NumPy\nlast words\nafter\n"
