"""Which blocks of a packed row can see each other: what attention's kernels visit.

Decided before a kernel runs, from the causal order, the window, and the smallest and largest segment of each
block. The answer is an interval of blocks, so that the kernel's loop has no branches.
"""

import jax
import jax.numpy as jnp


def visited_keys(
    segment_ids: jax.Array, queries: int, keys: int, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """For each block of `queries`, the first block of `keys` that it can see and the one after the last.

    Args:
        segment_ids: int32 [B, T]; 0 is padding.
        queries: Tokens of a block of queries.
        keys: Tokens of a block of keys.
        window: As in `attention`.

    Returns:
        Two of int32 [B, blocks of queries]; equal where nothing is seen.
    """
    visible = _block_may_attend(segment_ids, queries, keys, window)
    return _interval(visible, axis=2)


def visited_queries(
    segment_ids: jax.Array, queries: int, keys: int, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """For each block of `keys`, the first block of `queries` that can see it and the one after the last."""
    visible = _block_may_attend(segment_ids, queries, keys, window)
    return _interval(visible, axis=1)


def _block_may_attend(segment_ids: jax.Array, queries: int, keys: int, window: int | None) -> jax.Array:
    """bool [B, blocks of queries, blocks of keys]: False where no query sees a key."""
    first_query, last_query, low_query, high_query = _block_extent(segment_ids, queries)
    first_key, last_key, low_key, high_key = _block_extent(segment_ids, keys)
    visible = first_key[None, :] <= last_query[:, None]
    if window is not None:
        visible &= first_query[:, None] - last_key[None, :] < window
    return (
        visible
        & (low_query[:, :, None] <= high_key[:, None, :])
        & (low_key[:, None, :] <= high_query[:, :, None])
    )


def _block_extent(segment_ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """First and last index [N], and smallest and largest segment [B, N] without padding, of the blocks."""
    blocks = jnp.pad(segment_ids, ((0, 0), (0, -segment_ids.shape[1] % size))).reshape(
        segment_ids.shape[0], -1, size
    )
    first = jnp.arange(blocks.shape[1]) * size
    low = jnp.where(blocks == 0, jnp.iinfo(jnp.int32).max, blocks).min(axis=2)
    return first, first + size - 1, low, blocks.max(axis=2)


def _interval(visible: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    count = visible.shape[axis]
    number = jax.lax.broadcasted_iota(jnp.int32, visible.shape, axis)
    end = jnp.where(visible, number + 1, 0).max(axis)
    return jnp.minimum(jnp.where(visible, number, count).min(axis), end), end
