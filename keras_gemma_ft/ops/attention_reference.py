"""Attention as it is defined: a dense float32 softmax, quadratic in memory. Other rungs must equal it."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from keras_gemma_ft.ops.attention_mask import RESIDUALS, may_attend


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array, window: int | None
) -> jax.Array:
    """Arguments and result as in `keras_gemma_ft.ops.attention.attention`."""
    index = jnp.arange(q.shape[1])
    visible = may_attend(
        index[:, None], index[None, :], segment_ids[:, :, None], segment_ids[:, None, :], window
    )
    return checkpoint_name(masked_attention(q, k, v, visible), RESIDUALS)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention under any mask, with a float32 softmax.

    Args:
        q: [B, T, H, D], already scaled.
        k: [B, S, K, D]; H is a multiple of K.
        v: [B, S, K, D].
        visible: bool [B, T, S]; a query that sees nothing gives zeros, and gets and causes zero gradients.

    Returns:
        [B, T, H, D] in q's dtype.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    q_BxTxKxGxD = q.reshape(B, T, K, H // K, D)
    logits_BxKxGxTxS = jnp.einsum("btkgd,bskd->bkgts", q_BxTxKxGxD, k, preferred_element_type=jnp.float32)
    visible = visible[:, None, None]
    logits_BxKxGxTxS = jnp.where(visible, logits_BxKxGxTxS, jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(logits_BxKxGxTxS.max(axis=-1, keepdims=True))
    weights_BxKxGxTxS = jnp.where(visible, jnp.exp(logits_BxKxGxTxS - top), 0)
    total_BxTxKxGx1 = jnp.einsum("bkgts->btkg", weights_BxKxGxTxS)[..., None]
    # Dividing after the product costs T·D divisions in place of T·S.
    out_BxTxKxGxD = jnp.einsum(
        "bkgts,bskd->btkgd", weights_BxKxGxTxS.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out_BxTxKxGxD /= jnp.where(total_BxTxKxGx1 == 0, 1, total_BxTxKxGx1)
    return out_BxTxKxGxD.reshape(B, T, H, D).astype(q.dtype)
