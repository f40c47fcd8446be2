"""cuDNN's fused attention through jax.nn: head dims up to 256 on NVIDIA GPUs, causal, windows included.

Packed segments go in as a boolean mask, which becomes a bias of T² elements a row, with a gradient of the
same size; and with a bias the kernel computes every pair, seen or not. So our own kernels come first (H100,
jax 0.11.2, [4, 2048, 8 heads / 2 kv, 256], window 512, six examples a row, forward and backward: 1.00 ms
here, 0.42 there). Where the mask is large, this rung declines: only a private function under jax.nn takes the
segments themselves, and what it makes of them differs between JAX versions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from keras_gemma_ft.ops.attention_mask import RESIDUALS

LARGEST_MASK = 512 * 2**20  # bytes; it exists twice in the backward pass


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array, window: int | None
) -> jax.Array:
    """Arguments and result as in `keras_gemma_ft.ops.attention.attention`.

    Raises:
        NotImplementedError: No NVIDIA GPU with cuDNN, a head dim beyond what its generation takes (256 from
            Hopper on, else 128), operands that are not 16-bit floats, an odd length, a mask above 512 MiB.
    """
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, this is {jax.default_backend()}")
    B, T, _, D = q.shape
    if D > 256 or D % 8:
        raise NotImplementedError(f"head dim must be a multiple of 8 up to 256, got {D}")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}")
    if T % 2:
        raise NotImplementedError(f"the backward pass with a mask needs an even length, got {T}")
    if B * T * T * q.dtype.itemsize > LARGEST_MASK:
        raise NotImplementedError(f"the segments' mask of {B} x {T} x {T} would take too much memory")
    try:
        out = _fused(window, q, k, v, segment_ids)
    except RuntimeError as reason:  # what jax raises where no cuDNN is installed
        raise NotImplementedError(str(reason)) from reason
    # Padding attends to padding: finite, and neither its values nor its gradients leave here.
    return jnp.where((segment_ids != 0)[:, :, None, None], out, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return _call(window, q, k, v, segment_ids)


def _call(window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=(segment_ids[:, None, :, None] == segment_ids[:, None, None, :]),
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _forward(window, q, k, v, segment_ids):
    out, backward = jax.vjp(lambda q, k, v: _call(window, q, k, v, segment_ids), q, k, v)
    # What jax's backward pass needs is the output and the softmax's statistics, in float32. jax does not name
    # them, and without names a policy that saves RESIDUALS would run the kernel again.
    named = checkpoint_name(out, RESIDUALS)
    leaves, structure = jax.tree.flatten(backward)
    leaves = [
        named if leaf is out else checkpoint_name(leaf, RESIDUALS) if leaf.dtype == jnp.float32 else leaf
        for leaf in leaves
    ]
    return named, jax.tree.unflatten(structure, leaves)


def _backward(window, backward, d_out):
    return *backward(d_out), None


_fused.defvjp(_forward, _backward)
