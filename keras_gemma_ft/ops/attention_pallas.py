"""FlashAttention-2 as Triton kernels written in Pallas; blocks without a visible pair are never visited.

Forward keeps the output and the logarithm of each row's sum; backward recomputes the weights from it, once
for dq and once or twice for dk and dv (Dao 2023, arXiv:2307.08691, algorithms 1 and 2). Memory is linear in
the length. K and V are never repeated: the kernel of dk and dv runs through the query heads that share one.

A program visits an interval of blocks (attention_blocks.py), so that its loop has no branches and its loads
can be pipelined. Inside the interval, every block is masked.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from keras_gemma_ft.ops import nvidia
from keras_gemma_ft.ops.attention_blocks import visited_keys, visited_queries
from keras_gemma_ft.ops.attention_mask import RESIDUALS, may_attend
from keras_gemma_ft.ops.nvidia import compiler_params, dot, plgpu

LOG2_E = math.log2(math.e)
# Logits live in base 2. A hidden one is so far below the initial maximum that its weight is exactly 0, also
# in a row that sees nothing, whose maximum stays the initial one: forward and backward alike.
INITIAL_TOP, HIDDEN = -1e30, -2e30


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one kernel is cut.

    Attributes:
        queries: Queries of a block, a power of two, at least 16.
        keys: Keys of a block, likewise.
        warps: Warps of a program.
        stages: Blocks of the inner loop in flight.
    """

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The kernels' tilings for one head dim.

    Attributes:
        forward: A program holds a block of queries and runs through keys.
        dq: Likewise.
        dkv: A program holds a block of keys and runs through queries. One tiling: one kernel for both. Two: a
            kernel for dk and one for dv, which compute the weights twice, and in return have registers for
            twice as many keys.
    """

    forward: Tiling
    dq: Tiling
    dkv: Tiling | tuple[Tiling, Tiling]


# For GPUs with 227 KB of shared memory: three [64, 512] bfloat16 blocks, beside the one [64, 512] float32
# accumulator that fits 64k registers with its operands.
TUNING = {
    256: Tuning(
        Tiling(64, 32, warps=4), Tiling(128, 32, stages=3), (Tiling(64, 64, 4), Tiling(64, 64, 4, stages=3))
    ),
    512: Tuning(
        Tiling(64, 32), Tiling(64, 32, stages=1), (Tiling(32, 64, stages=1), Tiling(32, 64, stages=1))
    ),
}
LARGE_SHARED_MEMORY = (9.0, 10.0, 10.3)  # compute capabilities: Hopper, and Blackwell for data centers
# For GPUs with 99 KB, from Ampere on.
MODEST_TUNING = {
    256: Tuning(*[Tiling(32, 32, warps=4, stages=1)] * 3),
    512: Tuning(*[Tiling(16, 16, warps=4, stages=1)] * 3),
}
SMALL = Tuning(*[Tiling(32, 32, warps=4)] * 3)  # for small head dims


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array,
    window: int | None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Arguments and result as in `keras_gemma_ft.ops.attention.attention`, and:

    Args:
        tuning: How the kernels are cut; None takes the head dim's.
        interpret: Run the kernels' arithmetic in JAX, on any platform and in any dtype (slow).

    Raises:
        NotImplementedError: No NVIDIA GPU of compute capability 8.0 or more, operands that are not 16-bit
            floats, a head dim that is not a power of two from 16 to 512, or a JAX without Pallas-Triton.
    """
    if plgpu is None:
        raise NotImplementedError("this JAX has no Triton backend for Pallas")
    dim = q.shape[-1]
    if dim < 16 or dim > 512 or dim & (dim - 1):
        raise NotImplementedError(f"head dim must be a power of two from 16 to 512, got {dim}")
    if not interpret:
        nvidia.require()
        if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
            raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}, {k.dtype} and {v.dtype}")
    if tuning is None:
        large = nvidia.compute_capability() in LARGE_SHARED_MEMORY
        tuning = (TUNING if large else MODEST_TUNING).get(dim, SMALL)
    return flash_attention(window, tuning, interpret, q, k, v, segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def flash_attention(
    window: int | None,
    tuning: Tuning,
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """The kernels without `attention`'s checks, so that a machine without GPU can lower them."""
    return _forward(window, tuning, interpret, q, k, v, segment_ids)[0]


def _forward(window, tuning, interpret, q, k, v, segment_ids):
    out, log_sum = forward(window, tuning.forward, interpret, q, k, v, segment_ids)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (q, k, v, segment_ids, out, log_sum)


def _backward(window, tuning, interpret, residuals, d_out):
    q, k, v, segment_ids, out, log_sum = residuals
    # How much of a row's gradient the softmax takes away again, [B, H, T].
    delta = jnp.einsum("bthd,bthd->bht", out, d_out, preferred_element_type=jnp.float32)
    shared = (q, k, v, d_out, log_sum, delta, segment_ids)
    dq = query_gradient(window, tuning.dq, interpret, *shared)
    if isinstance(tuning.dkv, Tiling):
        dk, dv = key_value_gradient(window, tuning.dkv, interpret, ("dk", "dv"), *shared)
    else:
        (dk,) = key_value_gradient(window, tuning.dkv[0], interpret, ("dk",), *shared)
        (dv,) = key_value_gradient(window, tuning.dkv[1], interpret, ("dv",), *shared)
    return dq, dk, dv, None


flash_attention.defvjp(_forward, _backward)


# --- Forward ------------------------------------------------------------------------------------------------


def forward(
    window: int | None,
    tiling: Tiling,
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, H, D], and the base-2 logarithm of the sum of exponentials, float32 [B, H, T]."""
    B, T, H, _ = q.shape
    first, end = visited_keys(segment_ids, tiling.queries, tiling.keys, window)
    return pl.pallas_call(
        partial(_forward_kernel, tiling, window),
        grid=(H, B, pl.cdiv(T, tiling.queries)),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        compiler_params=compiler_params(tiling),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, segment_ids, first, end)


def _forward_kernel(
    tiling, window, q_ref, k_ref, v_ref, segment_ref, first_ref, end_ref, out_ref, log_sum_ref
):
    head, row = pl.program_id(0), pl.program_id(1)
    block = pl.num_programs(2) - 1 - pl.program_id(2)  # under a causal mask the last block has most to do
    key_head = _key_head(head, q_ref, k_ref)
    length, dim = q_ref.shape[1], q_ref.shape[3]
    queries = _Rows(block, tiling.queries, length)
    q = queries.load(q_ref, row, head)
    query_segments = queries.load_vector(segment_ref, row)

    def step(i, carry):
        out, top, total = carry
        keys = _Rows(i, tiling.keys, length)
        logits = LOG2_E * dot(q, keys.load(k_ref, row, key_head), 1, 1)
        visible = may_attend(
            queries.index[:, None],
            keys.index[None, :],
            query_segments[:, None],
            keys.load_vector(segment_ref, row)[None, :],
            window,
        )
        logits = jnp.where(visible, logits, HIDDEN)
        new_top = jnp.maximum(top, logits.max(axis=1))
        weights = jnp.exp2(logits - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        v = keys.load(v_ref, row, key_head)
        out = out * shrink[:, None] + dot(weights.astype(v.dtype), v, 1, 0)
        return out, new_top, total * shrink + weights.sum(axis=1)

    out, top, total = jax.lax.fori_loop(
        first_ref[row, block],
        end_ref[row, block],
        step,
        (
            jnp.zeros((tiling.queries, dim), jnp.float32),
            jnp.full((tiling.queries,), INITIAL_TOP, jnp.float32),
            jnp.zeros((tiling.queries,), jnp.float32),
        ),
    )
    total = jnp.where(total > 0, total, 1)
    queries.store(out_ref, row, head, out / total[:, None])
    queries.store_vector(log_sum_ref, row, head, top + jnp.log2(total))


# --- Backward -----------------------------------------------------------------------------------------------


def query_gradient(
    window: int | None,
    tiling: Tiling,
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    log_sum: jax.Array,
    delta: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """dq [B, T, H, D]."""
    B, T, H, _ = q.shape
    first, end = visited_keys(segment_ids, tiling.queries, tiling.keys, window)
    return pl.pallas_call(
        partial(_query_gradient_kernel, tiling, window),
        grid=(H, B, pl.cdiv(T, tiling.queries)),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=compiler_params(tiling),
        interpret=interpret,
        name="attention_dq",
    )(q, k, v, d_out, log_sum, delta, segment_ids, first, end)


def _query_gradient_kernel(
    tiling,
    window,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_sum_ref,
    delta_ref,
    segment_ref,
    first_ref,
    end_ref,
    dq_ref,
):
    head, row = pl.program_id(0), pl.program_id(1)
    block = pl.num_programs(2) - 1 - pl.program_id(2)
    key_head = _key_head(head, q_ref, k_ref)
    length, dim = q_ref.shape[1], q_ref.shape[3]
    queries = _Rows(block, tiling.queries, length)
    q, d_out = queries.load(q_ref, row, head), queries.load(d_out_ref, row, head)
    query_segments = queries.load_vector(segment_ref, row)
    log_sum = queries.load_vector(log_sum_ref, row, head)
    delta = queries.load_vector(delta_ref, row, head)

    def step(i, dq):
        keys = _Rows(i, tiling.keys, length)
        k = keys.load(k_ref, row, key_head)
        visible = may_attend(
            queries.index[:, None],
            keys.index[None, :],
            query_segments[:, None],
            keys.load_vector(segment_ref, row)[None, :],
            window,
        )
        logits = jnp.where(visible, LOG2_E * dot(q, k, 1, 1), HIDDEN)
        weights = jnp.exp2(logits - log_sum[:, None])
        d_weights = dot(d_out, keys.load(v_ref, row, key_head), 1, 1)
        d_logits = weights * (d_weights - delta[:, None])
        return dq + dot(d_logits.astype(k.dtype), k, 1, 0)

    dq = jax.lax.fori_loop(
        first_ref[row, block], end_ref[row, block], step, jnp.zeros((tiling.queries, dim), jnp.float32)
    )
    queries.store(dq_ref, row, head, dq)


def key_value_gradient(
    window: int | None,
    tiling: Tiling,
    interpret: bool,
    wanted: tuple[str, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    log_sum: jax.Array,
    delta: jax.Array,
    segment_ids: jax.Array,
) -> list[jax.Array]:
    """The `wanted` of "dk" and "dv", each [B, S, K, D], in this order."""
    B, S, K, _ = k.shape
    first, end = visited_queries(segment_ids, tiling.queries, tiling.keys, window)
    return pl.pallas_call(
        partial(_key_value_gradient_kernel, tiling, window, wanted),
        grid=(K, B, pl.cdiv(S, tiling.keys)),  # under a causal mask the first block has most to do
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in wanted],
        compiler_params=compiler_params(tiling),
        interpret=interpret,
        name="attention_" + "_".join(wanted),
    )(q, k, v, d_out, log_sum, delta, segment_ids, first, end)


def _key_value_gradient_kernel(
    tiling,
    window,
    wanted,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    log_sum_ref,
    delta_ref,
    segment_ref,
    first_ref,
    end_ref,
    *gradient_refs,
):
    key_head, row, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length, dim = q_ref.shape[1], q_ref.shape[3]
    group = q_ref.shape[2] // k_ref.shape[2]
    keys = _Rows(block, tiling.keys, length)
    k = keys.load(k_ref, row, key_head)
    v: Any = keys.load(v_ref, row, key_head) if "dk" in wanted else None
    key_segments = keys.load_vector(segment_ref, row)
    first, end = first_ref[row, block], end_ref[row, block]
    blocks = end - first

    def step(i, gradients):
        # One loop over query heads and blocks: a loop inside a loop would drain the pipeline for each head.
        head = key_head * group + jax.lax.div(i, blocks)
        queries = _Rows(first + jax.lax.rem(i, blocks), tiling.queries, length)
        q, d_out = queries.load(q_ref, row, head), queries.load(d_out_ref, row, head)
        visible = may_attend(
            queries.index[None, :],
            keys.index[:, None],
            queries.load_vector(segment_ref, row)[None, :],
            key_segments[:, None],
            window,
        )
        # Transposed, [keys, queries]: so the weights are the left operand of both products below.
        logits = jnp.where(visible, LOG2_E * dot(k, q, 1, 1), HIDDEN)
        weights = jnp.exp2(logits - queries.load_vector(log_sum_ref, row, head)[None, :])
        updates = {}
        if "dv" in wanted:
            updates["dv"] = dot(weights.astype(d_out.dtype), d_out, 1, 0)
        if "dk" in wanted:
            d_weights = dot(v, d_out, 1, 1)
            d_logits = weights * (d_weights - queries.load_vector(delta_ref, row, head)[None, :])
            updates["dk"] = dot(d_logits.astype(q.dtype), q, 1, 0)
        return tuple(total + updates[name] for total, name in zip(gradients, wanted, strict=True))

    zeros = jnp.zeros((tiling.keys, dim), jnp.float32)
    gradients = jax.lax.fori_loop(0, group * blocks, step, (zeros,) * len(wanted))
    for ref, gradient in zip(gradient_refs, gradients, strict=True):
        keys.store(ref, row, key_head, gradient)


# --- Blocks -------------------------------------------------------------------------------------------------


class _Rows:
    """A block of `size` consecutive rows of arrays [B, T, heads, D], [B, T] or [B, heads, T] in a kernel.

    What lies beyond the last row is read as zero, which is the segment of padding, and never written.
    """

    def __init__(self, block: Any, size: int, length: int) -> None:
        start = block * size
        self.rows = pl.ds(start, size)
        self.index = start + jnp.arange(size, dtype=jnp.int32)
        self.inside = self.index < length if length % size else None

    def load(self, ref: Any, row: Any, head: Any) -> jax.Array:
        tile = ref.at[row, self.rows, head, :]
        if self.inside is None:
            return plgpu.load(tile)
        return plgpu.load(tile, mask=jnp.broadcast_to(self.inside[:, None], tile.shape), other=0)

    def load_vector(self, ref: Any, *outer: Any) -> jax.Array:
        tile = ref.at[(*outer, self.rows)]
        return plgpu.load(tile) if self.inside is None else plgpu.load(tile, mask=self.inside, other=0)

    def store(self, ref: Any, row: Any, head: Any, value: jax.Array) -> None:
        tile = ref.at[row, self.rows, head, :]
        mask = None if self.inside is None else jnp.broadcast_to(self.inside[:, None], tile.shape)
        plgpu.store(tile, value.astype(ref.dtype), mask=mask)

    def store_vector(self, ref: Any, row: Any, head: Any, value: jax.Array) -> None:
        plgpu.store(ref.at[row, head, self.rows], value.astype(ref.dtype), mask=self.inside)


def _key_head(head, q_ref, k_ref):
    return jax.lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
