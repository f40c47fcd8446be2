"""Reading arrays from files: what is read, how much ahead, and files that end too soon."""

import threading

import ml_dtypes
import numpy as np
import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import reading

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def mapped(tmp_path):
    """A file of 1,000 random bytes, mapped from its eighth byte on."""
    content = np.random.default_rng(0).integers(0, 120, 1000, np.uint8)
    (tmp_path / "weights").write_bytes(content.tobytes())
    return np.memmap(tmp_path / "weights", np.uint8, "r", offset=8)


@pytest.mark.parametrize(
    "part",
    [
        lambda mapped: mapped,
        lambda mapped: mapped[24:824].view(BFLOAT16).reshape(20, 20)[3:17],
        lambda mapped: mapped[:900].reshape(30, 30).T,
        lambda mapped: np.arange(12.0).reshape(3, 4)[1:],
    ],
    ids=["all", "rows of a view", "transposed", "no file"],
)
def test_what_is_in_memory_is_what_was_mapped(mapped, part):
    array = part(mapped)
    copy = reading.in_memory(array)
    assert not isinstance(copy, np.memmap)
    assert not np.shares_memory(copy, array)
    assert copy.ctypes.data % 64 == 0
    assert copy.dtype == array.dtype
    np.testing.assert_array_equal(copy, array)


def test_a_file_that_has_become_shorter_is_named(mapped, tmp_path):
    (tmp_path / "weights").write_bytes(b"0" * 700)
    np.testing.assert_array_equal(reading.in_memory(mapped[:692]), b"0"[0])
    with pytest.raises(UserError, match=r"weights: ends 8 bytes before a weight does.*\n.*download"):
        reading.in_memory(mapped[:700])


def test_arrays_come_in_their_order_and_others_as_they_are(mapped, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD", 100)
    other, large, small = object(), mapped[:101], [mapped[:60], mapped[10:50], mapped[20:80]]
    items = [("a", small[0]), ("b", other), ("c", small[1]), ("d", large), ("e", small[2])]
    found = list(reading.ahead(iter(items)))
    assert [key for key, _ in found] == list("abcde")
    assert found[1][1] is other
    assert found[3][1] is large
    for place, array in zip((0, 2, 4), small, strict=True):
        assert not isinstance(found[place][1], np.memmap)
        np.testing.assert_array_equal(found[place][1], array)


def test_as_many_bytes_are_read_ahead_as_may_be(mapped, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD", 250)
    began, all_began = [], threading.Event()
    read = reading.in_memory

    def in_memory(array):
        began.append(len(began))
        if len(began) == 3:
            all_began.set()
        return read(array)

    monkeypatch.setattr(reading, "in_memory", in_memory)
    items = reading.ahead((number, mapped[:100]) for number in range(10))
    assert next(items)[0] == 0
    assert all_began.wait(10)  # two wait, one was given
    items.close()
    assert began == [0, 1, 2]


def test_an_error_comes_to_whom_asks_for_the_array(mapped, tmp_path):
    items = reading.ahead([(1, mapped[:100]), (2, mapped), (3, mapped[:1])])
    (tmp_path / "weights").write_bytes(b"0" * 200)
    assert next(items)[0] == 1
    with pytest.raises(UserError, match="ends"):
        next(items)
