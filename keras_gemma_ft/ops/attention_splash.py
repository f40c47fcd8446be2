"""Splash attention, JAX's own kernels for TPUs: causal order, windows, segments, shared key heads."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from keras_gemma_ft.ops.attention_mask import RESIDUALS

try:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
except ImportError:
    splash = None  # type: ignore[assignment]

LANES = 128  # its blocks are multiples of a TPU register's width
LARGEST_BLOCK = 512


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Arguments and result as in `keras_gemma_ft.ops.attention.attention`, and:

    Args:
        interpret: Run the kernels' arithmetic in JAX, on any platform (slow).

    Raises:
        NotImplementedError: No TPU, a head dim that is not a multiple of 128, a JAX without splash attention.
    """
    if jax.default_backend() != "tpu" and not interpret:
        raise NotImplementedError(f"needs a TPU, this is {jax.default_backend()}")
    return splash_attention(window, interpret, q, k, v, segment_ids)


def splash_attention(
    window: int | None, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """`attention` without its look at the platform, so that it can be lowered on a machine without TPU."""
    if splash is None:
        raise NotImplementedError("this JAX has no splash attention")
    _, length, heads, dim = q.shape
    if dim % LANES:
        raise NotImplementedError(f"head dim must be a multiple of {LANES}, got {dim}")
    spare = -length % LANES
    padded = length + spare
    block = next(size for size in range(LARGEST_BLOCK, 0, -LANES) if padded % size == 0)
    kernel = _kernel(heads, padded, block, window, interpret)

    def heads_first(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, 0), (0, spare), (0, 0), (0, 0))).swapaxes(1, 2)

    segments = jnp.pad(segment_ids, ((0, 0), (0, spare)))
    out = jax.vmap(kernel)(
        heads_first(q), heads_first(k), heads_first(v), splash.SegmentIds(segments, segments)
    )
    out = out.swapaxes(1, 2)[:, :length]
    # Padding attends to padding: finite, and neither its values nor its gradients leave here. The kernel
    # names its residuals itself, its output among them.
    return jnp.where((segment_ids != 0)[:, :, None, None], out, 0)


@cache
def _kernel(heads: int, length: int, block: int, window: int | None, interpret: bool) -> Any:
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    with jax.ensure_compile_time_eval():  # the kernel holds arrays, which must not be tracers when cached
        return splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
