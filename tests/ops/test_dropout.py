"""The mask of dropout as a hash: its share, and what it depends on."""

import jax.numpy as jnp
import numpy as np
import pytest

from keras_gemma_ft.ops import dropout

RATE, SHAPE = 0.3, (4, 50, 96)
KEY = jnp.array([3, 9], jnp.uint32)


def dropped(key, shape=SHAPE) -> np.ndarray:
    return np.asarray(dropout.drop(jnp.ones(shape), RATE, key)) == 0


def assert_independent(one: np.ndarray, other: np.ndarray) -> None:
    """Two masks agree as often as chance has it, within four standard deviations."""
    chance = RATE**2 + (1 - RATE) ** 2
    assert abs((one == other).mean() - chance) < 4 * (chance * (1 - chance) / one.size) ** 0.5


def test_a_share_is_dropped():
    share = dropped(KEY).mean()
    assert abs(share - RATE) < 4 * (RATE * (1 - RATE) / np.prod(SHAPE)) ** 0.5


@pytest.mark.parametrize("change", [[1, 0], [0, 2], [7, 11]], ids=["first word", "second word", "both"])
def test_keys_give_independent_masks(change):
    assert_independent(dropped(KEY), dropped(KEY + jnp.array(change, jnp.uint32)))


def test_rows_and_columns_are_independent():
    mask = dropped(KEY).reshape(-1, SHAPE[-1])
    assert_independent(mask[1:], mask[:-1])
    assert_independent(mask[:, 1:], mask[:, :-1])


def test_a_tile_has_its_part_of_the_mask():
    rows, columns = jnp.arange(40, 56, dtype=jnp.uint32), jnp.arange(32, 64, dtype=jnp.uint32)
    tile = dropout.kept(dropout.row_hash(rows, KEY)[:, None], columns, RATE, KEY)
    np.testing.assert_array_equal(~np.asarray(tile), dropped(KEY).reshape(-1, SHAPE[-1])[40:56, 32:64])
