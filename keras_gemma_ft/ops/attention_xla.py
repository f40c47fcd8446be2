"""Attention in plain XLA with memory linear in the length, forward and backward, on every platform.

With a window, queries are cut into blocks of one window, and a block looks at itself and its left neighbour:
all blocks run as one batch. Without, one block of queries after the other looks at all keys. Both recompute
their logits in the backward pass.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from keras_gemma_ft.ops.attention_mask import RESIDUALS, may_attend
from keras_gemma_ft.ops.attention_reference import masked_attention

QUERIES_AT_ONCE = 128  # without a window; logits of [B, H, 128, T] in float32 exist at a time


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array, window: int | None
) -> jax.Array:
    """Arguments and result as in `keras_gemma_ft.ops.attention.attention`."""
    if window is not None and window < q.shape[1]:
        out = _local(q, k, v, segment_ids, window)
    else:
        out = _global(q, k, v, segment_ids)
    return checkpoint_name(out, RESIDUALS)


def _local(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int) -> jax.Array:
    length = q.shape[1]
    # N blocks of W tokens, the last one filled up with padding.
    q_BxNxWxHxD, k_BxNxWxKxD, v_BxNxWxKxD, segments_BxNxW = (
        _blocks(array, window) for array in (q, k, v, segment_ids)
    )

    def with_left_neighbour(blocks: jax.Array) -> jax.Array:
        left = jnp.pad(blocks, ((0, 0), (1, 0)) + ((0, 0),) * (blocks.ndim - 2))[:, :-1]
        return jnp.concatenate([left, blocks], axis=2)

    visible = may_attend(
        window + jnp.arange(window)[:, None],
        jnp.arange(2 * window)[None, :],
        segments_BxNxW[..., :, None],
        with_left_neighbour(segments_BxNxW)[..., None, :],
        window,
    )
    attend_to_blocks = jax.checkpoint(jax.vmap(masked_attention, in_axes=1, out_axes=1))
    out_BxNxWxHxD = attend_to_blocks(
        q_BxNxWxHxD, with_left_neighbour(k_BxNxWxKxD), with_left_neighbour(v_BxNxWxKxD), visible
    )
    return out_BxNxWxHxD.reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def _global(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    length = q.shape[1]
    block = min(QUERIES_AT_ONCE, length)
    q_NxBxWxHxD, segments_NxBxW = (jnp.moveaxis(_blocks(array, block), 1, 0) for array in (q, segment_ids))
    # The loop's backward pass adds up the gradients of k and v over the blocks: in float32.
    wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def attend(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        number, q_BxWxHxD, segments_BxW = inputs
        visible = may_attend(
            number * block + jnp.arange(block)[:, None],
            jnp.arange(length)[None, :],
            segments_BxW[:, :, None],
            segment_ids[:, None, :],
            None,
        )
        return masked_attention(q_BxWxHxD, wide_k.astype(k.dtype), wide_v.astype(v.dtype), visible)

    out_NxBxWxHxD = jax.lax.map(attend, (jnp.arange(q_NxBxWxHxD.shape[0]), q_NxBxWxHxD, segments_NxBxW))
    return jnp.moveaxis(out_NxBxWxHxD, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def _blocks(array: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] as [B, N, size, ...], filled up with zeros."""
    spare = -array.shape[1] % size
    padded = jnp.pad(array, ((0, 0), (0, spare)) + ((0, 0),) * (array.ndim - 2))
    return padded.reshape(array.shape[0], -1, size, *array.shape[2:])
