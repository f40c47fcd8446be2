"""Causal attention of packed rows, with windows and shared key heads: a ladder of implementations.

- "reference": dense, float32 softmax. The definition; quadratic in memory.
- "xla": plain XLA, memory linear in the length. For CPU, and wherever the others decline.
- "pallas": our own Triton kernels, head dims up to 512, memory linear in the length.
- "cudnn": NVIDIA's library, head dims up to 256.
- "splash": JAX's kernels for TPU.

A rung that cannot serve a call raises NotImplementedError with the reason, and the next one is asked.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from keras_gemma_ft.ops import (
    attention_cudnn,
    attention_pallas,
    attention_reference,
    attention_splash,
    attention_xla,
)

RUNGS: dict[str, Callable[..., jax.Array]] = {
    "reference": attention_reference.attention,
    "xla": attention_xla.attention,
    "cudnn": attention_cudnn.attention,
    "pallas": attention_pallas.attention,
    "splash": attention_splash.attention,
}
LADDERS = {"gpu": ("pallas", "cudnn", "xla"), "tpu": ("splash", "xla")}

Result = TypeVar("Result")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array,
    window: int | None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q kᵀ) v for each token over the tokens of its own example that are not later.

    A row of 8 tokens that holds two examples and padding, with a window of 2:

        segment_ids  1 1 1 2 2 2 2 0
        token 2 sees . x x . . . . .      token 3 sees only itself      token 7 sees nothing: zeros

    Differentiable in q, k and v; gradients of padding are zero. What the backward pass keeps of the forward
    pass, beside the arguments, carries the checkpoint name `attention_mask.RESIDUALS`.

    Args:
        q: [B, T, H, D], bfloat16 or float32, already scaled (Gemma 4's scale is 1: q and k are normed).
        k: [B, T, K, D]; query head h uses key head h // (H / K).
        v: [B, T, K, D].
        segment_ids: int32 [B, T]; 0 is padding. Tokens see each other only in the same segment.
        window: How many tokens a token sees at most, itself included; None: all.
        implementation: A rung; None takes the first of the platform's ladder that does not decline.

    Returns:
        [B, T, H, D] in q's dtype; the softmax is float32.

    Raises:
        NotImplementedError: The rung asked for, or every rung, declines; the message has the reasons.
        ValueError: Shapes that do not fit, or an unknown implementation.
    """
    if q.shape[:2] != segment_ids.shape or k.shape != v.shape or k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} and segment_ids {segment_ids.shape} do not fit together"
        )
    if q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"the heads of q {q.shape} must be a multiple of k's {k.shape}, of the same size")
    return _climb(implementation, lambda rung: rung(q, k, v, segment_ids=segment_ids, window=window))[1]


def choose(
    q: jax.ShapeDtypeStruct | jax.Array,
    k: jax.ShapeDtypeStruct | jax.Array,
    *,
    window: int | None,
    implementation: str | None = None,
) -> tuple[str, dict[str, str]]:
    """Which rung `attention` takes for such arguments, without computing anything; for the log of a run.

    Args:
        q: Shape and dtype as in `attention`.
        k: Likewise.
        window: Likewise.
        implementation: Likewise.

    Returns:
        The rung's name, and for each rung above it that declined, why.

    Raises:
        NotImplementedError: Every rung declines.
        ValueError: An unknown implementation.
    """
    segment_ids = jax.ShapeDtypeStruct(q.shape[:2], "int32")

    def shape_of(rung: Callable[..., jax.Array]) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(
            lambda q, k, v, segment_ids: rung(q, k, v, segment_ids=segment_ids, window=window),
            q, k, k, segment_ids,
        )  # fmt: skip

    name, _, declined = _climb(implementation, shape_of)
    return name, declined


def _climb(
    implementation: str | None, attempt: Callable[[Callable[..., jax.Array]], Result]
) -> tuple[str, Result, dict[str, str]]:
    """The first rung whose attempt does not decline, what the attempt gave, and who declined before it."""
    if implementation is None:
        names = LADDERS.get(jax.default_backend(), ("xla",))
    elif implementation in RUNGS:
        names = (implementation,)
    else:
        raise ValueError(f"implementation must be one of {', '.join(RUNGS)}, got {implementation!r}")
    declined: dict[str, str] = {}
    for name in names:
        try:
            return name, attempt(RUNGS[name]), declined
        except NotImplementedError as reason:
            declined[name] = str(reason)
    raise NotImplementedError("; ".join(f"{name} declines: {reason}" for name, reason in declined.items()))


def decode_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cached_k: jax.Array, cached_v: jax.Array, seen: jax.Array
) -> jax.Array:
    """Attention of one new token to itself and to a cache, which need not hold it yet.

    So a cache is only read here, and what is new in all layers can be written to it at once.

    Args:
        q: [B, 1, H, D], already scaled.
        k: [B, 1, K, D], the token's own key.
        v: [B, 1, K, D].
        cached_k: [B, K, S, D]; the heads are in front, as the products read them.
        cached_v: [B, K, S, D].
        seen: bool [B, S], the entries that the token sees; window, length and validity are the caller's.

    Returns:
        [B, 1, H, D] in q's dtype.
    """
    (B, _, H, D), K = q.shape, k.shape[2]
    q_BxKxGxD = q.reshape(B, K, H // K, D)
    wide = {"preferred_element_type": jnp.float32}
    own_BxKxG = jnp.einsum("bkgd,bkd->bkg", q_BxKxGxD, k[:, 0], **wide)
    logits_BxKxGxS = jnp.einsum("bkgd,bksd->bkgs", q_BxKxGxD, cached_k, **wide)
    logits_BxKxGxS = jnp.where(seen[:, None, None], logits_BxKxGxS, -jnp.inf)
    top_BxKxG = jnp.maximum(own_BxKxG, logits_BxKxGxS.max(axis=-1))
    own_BxKxG = jnp.exp(own_BxKxG - top_BxKxG)
    weights_BxKxGxS = jnp.exp(logits_BxKxGxS - top_BxKxG[..., None])
    total_BxKxG = own_BxKxG + weights_BxKxGxS.sum(axis=-1)
    out_BxKxGxD = jnp.einsum("bkgs,bksd->bkgd", weights_BxKxGxS.astype(v.dtype), cached_v, **wide)
    out_BxKxGxD += own_BxKxG[..., None] * v[:, 0, :, None].astype(jnp.float32)
    return (out_BxKxGxD / total_BxKxG[..., None]).reshape(B, 1, H, D).astype(q.dtype)
