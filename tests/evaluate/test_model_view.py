"""Losses come back in the order of the conversations, out of a handful of batch shapes."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.evaluate.model_view import ModelView


def conversation(length):
    return Conversation(
        [{"role": "user", "content": "q"}, {"role": "model", "content": "x" * length}], str(length)
    )


def encode(row):
    """`length` tokens counted from 1, of which the last half are targets."""
    length = int(row.origin)
    return SimpleNamespace(token_ids=np.arange(1, length + 1), loss_mask=np.arange(length) >= length // 2)


class Losses:
    """Each target costs its token's number; padding must cost nothing."""

    def __init__(self):
        self.shapes = []

    def __call__(self, batch):
        self.shapes.append(batch["token_ids"].shape)
        assert not batch["loss_mask"][batch["segment_ids"] == 0].any()
        np.testing.assert_array_equal(
            batch["positions"] + 1, np.where(batch["segment_ids"], batch["token_ids"], 1)
        )
        return (batch["token_ids"] * batch["loss_mask"]).sum(1)


def test_losses_keep_the_order_of_the_conversations():
    lengths = np.random.default_rng(0).integers(2, 700, 60)
    losses = Losses()
    view = ModelView(lambda *_: [], losses, encode, batch_tokens=2048)
    summed, tokens = view.score([conversation(length) for length in lengths])
    expected = [np.arange(length // 2 + 1, length + 1).sum() for length in lengths]
    np.testing.assert_array_equal(summed, expected)
    np.testing.assert_array_equal(tokens, lengths - lengths // 2)
    assert set(losses.shapes) <= {(32, 64), (16, 128), (8, 256), (4, 512), (2, 1024)}
    assert losses.shapes == sorted(losses.shapes, key=lambda shape: -shape[1])  # the longest first


@pytest.mark.parametrize(("length", "padded"), [(1, 64), (64, 64), (65, 128), (128, 128), (5000, 8192)])
def test_lengths_are_padded_to_powers_of_two(length, padded):
    losses = Losses()
    ModelView(lambda *_: [], losses, encode, batch_tokens=64).score([conversation(length)])
    assert losses.shapes == [(1, padded)]


def test_both_ways_of_asking_happen_inside_the_view():
    inside = []

    @contextlib.contextmanager
    def base():
        inside.append(True)
        yield
        inside.append(False)

    def generate(prompts, max_new_tokens):
        assert inside[-1]
        return ["a"] * len(prompts)

    def losses(batch):
        assert inside[-1]
        return np.zeros(len(batch["token_ids"]))

    view = ModelView(generate, losses, encode, view=base)
    assert view.generate([Conversation([{"role": "user", "content": "q"}], "")], 4) == ["a"]
    view.score([conversation(3)])
    assert inside == [True, False] * 2
