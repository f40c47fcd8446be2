"""The vocabulary loss: −log softmax(soft-capped hidden · Eᵀ)[target], summed over the supervised tokens.

Neither the logits [N, V] nor a dequantized table ever exist. Supervised tokens are gathered to the front and
cut into chunks, of which only as many run as there are tokens; a chunk meets the table block by block. Each
block adds to two sums of a token, as keys do in FlashAttention (Dao et al., 2022, arXiv:2205.14135):

    others = Σ exp(z)            over every entry of the vocabulary but the target
    pull   = Σ exp(z) · z' · E   likewise; z' is the soft cap's derivative

and with `total = others + exp(z_target)` they give the loss and its gradient:

    loss     = log total − z_target
    d_hidden = pull / total − others / total · z'_target · E_target

So the forward pass of differentiation computes each logit once: two products where the table is frozen. The
target stands apart because its coefficient, p − 1, has no digits left in bfloat16 once the model is
confident. The soft cap also bounds z, so that no running maximum has to be subtracted: the logits are read
once.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from keras_gemma_ft.ops import nf4
from keras_gemma_ft.ops.quantize import QuantizedTensor, dequantize, gather_rows

Table: TypeAlias = jax.Array | QuantizedTensor

# Logits of 1024 x 16384 exist at a time: 64 MiB in float32, half of that for their gradient in bfloat16. From
# 8192 tokens on, chunks are twice as long and blocks half as large: 43.6 ms in place of 47.2 (H200, E4B, 8192
# tokens), and still no more than a quarter of a batch is computed for nothing.
CHUNK_TOKENS, BLOCK_ROWS, MANY_TOKENS = 1024, 16384, 8192
# Where the soft cap is at most this, exp(±cap) and their sums stay within float32 and bfloat16.
LARGEST_BOUND = 60.0


def cross_entropy_sum(
    hidden: jax.Array,
    embedding: Table,
    targets: jax.Array,
    mask: jax.Array,
    *,
    soft_cap: float | None,
    train_embedding: bool = False,
    chunk_tokens: int | None = None,
    block_rows: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Σ over supervised tokens of −log softmax(cap · tanh(hidden · Eᵀ / cap))[target], and their number.

    Of 5 tokens with the mask 0 1 1 0 1, in chunks of 2: tokens 1 and 2 are the first chunk, token 4 and a row
    of zeros the second; a third does not run. What hidden and targets hold at masked tokens does not matter.

    Differentiable in hidden, and in the embedding with `train_embedding` (else it is a constant). Gradients
    are computed in the forward pass, and scaled by the cotangent in the backward pass: under `jax.checkpoint`
    they would be computed twice. Tokens are gathered across the array: where N is sharded, call this on each
    shard in `jax.shard_map(..., check_vma=False)` and add up both results.

    Args:
        hidden: [N, D], bfloat16 or float32.
        embedding: [V, D], an array or a QuantizedTensor; multiplied in hidden's dtype.
        targets: int32 [N], in [0, V) where supervised.
        mask: bool [N], True where supervised.
        soft_cap: Gemma's is 30; None leaves the logits as they are.
        train_embedding: Also accumulate the table's gradient, float32 [V, D], in the forward pass: two more
            products, since the logits are computed again once their sum is known. It is live from here to the
            optimizer either way, so nothing would be saved by leaving it to the backward pass.
        chunk_tokens: Tokens at once; None: 1024, or 2048 of many.
        block_rows: Rows of the table at once; None: 16384, or 8192 for many tokens.

    Returns:
        The sum, float32, 0 where nothing is supervised, and the number of supervised tokens, int32.

    Raises:
        ValueError: Shapes that do not fit, or `train_embedding` with a quantized table.
    """
    (count, width), vocabulary = hidden.shape, embedding.shape[0]
    if embedding.shape != (vocabulary, width) or targets.shape != (count,) or mask.shape != (count,):
        raise ValueError(
            f"hidden {hidden.shape}, embedding {embedding.shape}, targets {targets.shape} and mask "
            f"{mask.shape} do not fit together"
        )
    longer = 2 if count >= MANY_TOKENS else 1
    chunk_tokens = max(1, min(chunk_tokens or CHUNK_TOKENS * longer, count))
    block_rows = min(block_rows or BLOCK_ROWS // longer, vocabulary)
    if isinstance(embedding, QuantizedTensor):
        if train_embedding:
            raise ValueError("a quantized table has no gradient: train_embedding needs an array")
        if embedding.kind == "nf4" and block_rows * width % nf4.BLOCK:
            raise ValueError(f"{block_rows} rows of {width} do not divide into NF4's blocks of {nf4.BLOCK}")
    plan = _Plan(soft_cap, train_embedding, chunk_tokens, block_rows)
    return _cross_entropy_sum(plan, hidden, embedding, targets, mask.astype(bool))


def reference(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array, soft_cap: float | None
) -> jax.Array:
    """The sum as it is defined, with logits [N, V] in float32; `cross_entropy_sum` must equal it."""
    logits_NxV, _ = _soft_cap(_product(hidden, embedding, 1, 1), soft_cap)
    of_target_N = jnp.take_along_axis(logits_NxV, targets[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits_NxV, axis=1) - of_target_N, 0))


def scores(hidden: jax.Array, embedding: Table, block_rows: int = BLOCK_ROWS) -> jax.Array:
    """The uncapped logits, float32 [..., V], of hidden [..., D], bfloat16 or float32.

    A quantized table is dequantized block by block, so that no whole one exists.

    Args:
        hidden: [..., D].
        embedding: [V, D], an array or a QuantizedTensor; multiplied in hidden's dtype.
        block_rows: Rows of a quantized table at once.
    """
    last = hidden.ndim - 1

    def product(table_RxD: jax.Array) -> jax.Array:
        axes = (((last,), (1,)), ((), ()))
        return jax.lax.dot_general(hidden, table_RxD, axes, preferred_element_type=jnp.float32)

    if not isinstance(embedding, QuantizedTensor):
        return product(embedding.astype(hidden.dtype))
    vocabulary = embedding.shape[0]
    rows, table = min(block_rows, vocabulary), _with_plain_scales(embedding)

    def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
        block = product(_converted_rows(table, i, rows, hidden.dtype))
        # As the last block of rows, these end with the table.
        return jax.lax.dynamic_update_slice_in_dim(out, block, jnp.minimum(i * rows, vocabulary - rows), last)

    out = jnp.zeros((*hidden.shape[:-1], vocabulary), jnp.float32)
    return jax.lax.fori_loop(0, -(-vocabulary // rows), add_block, out)


class _Plan(NamedTuple):
    """What is known before any data; each as in `cross_entropy_sum`."""

    soft_cap: float | None
    train_embedding: bool
    chunk_tokens: int
    block_rows: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy_sum(
    plan: _Plan, hidden: jax.Array, embedding: Table, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _run(plan, False, hidden, embedding, targets, mask)[0]


def _forward(plan, hidden, embedding, targets, mask):
    sums, d_hidden, d_embedding = _run(plan, True, hidden, embedding, targets, mask)
    # An array without elements tells the backward pass the table's dtype.
    like = jnp.zeros((0,), embedding.dtype) if plan.train_embedding else None
    return sums, (d_hidden, d_embedding, like)


def _backward(plan, residuals, d_sums):
    d_hidden, d_embedding, like = residuals
    scale, _ = d_sums
    d_hidden = (d_hidden.astype(jnp.float32) * scale).astype(d_hidden.dtype)
    if plan.train_embedding:
        d_embedding = (d_embedding * scale).astype(like.dtype)
    return d_hidden, d_embedding, None, None


_cross_entropy_sum.defvjp(_forward, _backward)


# --- Chunks of tokens ---------------------------------------------------------------------------------------


def _run(
    plan: _Plan, gradient: bool, hidden: jax.Array, embedding: Table, targets: jax.Array, mask: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None, jax.Array | None]:
    """Loss and tokens, and with `gradient` d_hidden [N, D] and, where trained, d_embedding float32 [V, D]."""
    count, size = hidden.shape[0], plan.chunk_tokens
    supervised = jnp.sum(mask, dtype=jnp.int32)
    # The supervised tokens' indices, then `count`: out of bounds, which reads as zeros.
    order = jnp.flatnonzero(mask, size=count + -count % size, fill_value=count).astype(jnp.int32)
    table = _with_plain_scales(embedding)

    def step(i: jax.Array, carry: Any) -> Any:
        loss, d_sorted, d_embedding = carry
        index_C = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        hidden_CxD = hidden.at[index_C].get(mode="fill", fill_value=0)
        targets_C = targets.at[index_C].get(mode="fill", fill_value=0)
        chunk = _chunk(plan, gradient, hidden_CxD, table, targets_C)
        loss += jnp.sum(jnp.where(index_C < count, chunk.loss, 0))
        if d_sorted is not None and chunk.d_hidden is not None:
            d_sorted = jax.lax.dynamic_update_slice_in_dim(d_sorted, chunk.d_hidden, i * size, 0)
        if d_embedding is not None:
            d_embedding = _add_table_gradient(plan, d_embedding, hidden_CxD, table, targets_C, chunk)
        return loss, d_sorted, d_embedding

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((order.size, hidden.shape[1]), hidden.dtype) if gradient else None,
        jnp.zeros(embedding.shape, jnp.float32) if gradient and plan.train_embedding else None,
    )
    loss, d_sorted, d_embedding = jax.lax.fori_loop(0, (supervised + size - 1) // size, step, start)
    if d_sorted is None:
        return (loss, supervised), None, None
    place_N = jnp.cumsum(mask, dtype=jnp.int32) - 1
    d_hidden = jnp.where(mask[:, None], d_sorted.at[place_N].get(mode="clip"), 0)
    return (loss, supervised), d_hidden, d_embedding


class _Chunk(NamedTuple):
    """What a chunk of C tokens gives."""

    loss: jax.Array  # float32 [C]
    log_total: jax.Array  # float32 [C], the logarithm of Σ exp(z)
    target_coefficient: jax.Array  # float32 [C], the loss's derivative by the target's uncapped logit
    d_hidden: jax.Array | None  # [C, D] in hidden's dtype


def _chunk(plan: _Plan, gradient: bool, hidden_CxD: jax.Array, table: Table, targets_C: jax.Array) -> _Chunk:
    bounded = plan.soft_cap is not None and plan.soft_cap <= LARGEST_BOUND

    def add_block(i: jax.Array | int, carry: Any) -> Any:
        top_C, others_C, pull_CxD = carry
        block = _block(plan, i, hidden_CxD, table, targets_C)
        if not bounded:
            new_top_C = jnp.maximum(top_C, block.z.max(axis=1))
            shrink_C = jnp.exp(top_C - new_top_C)
            top_C, others_C = new_top_C, others_C * shrink_C
            pull_CxD = None if pull_CxD is None else pull_CxD * shrink_C[:, None]
        weights_CxR = jnp.where(block.counted, jnp.exp(block.z - top_C[:, None]), 0)
        others_C += weights_CxR.sum(axis=1)
        if pull_CxD is not None:
            pull_CxD += _product((weights_CxR * block.slope).astype(hidden_CxD.dtype), block.table, 1, 0)
        return top_C, others_C, pull_CxD

    start = (
        jnp.full(targets_C.shape, 0 if bounded else -jnp.inf, jnp.float32),
        jnp.zeros(targets_C.shape, jnp.float32),
        jnp.zeros(hidden_CxD.shape, jnp.float32) if gradient else None,
    )
    top_C, others_C, pull_CxD = _for_each_block(plan, table, add_block, start)

    target_CxD = _rows(table, targets_C, hidden_CxD.dtype).astype(jnp.float32)
    z_C, slope_C = _soft_cap(jnp.sum(hidden_CxD.astype(jnp.float32) * target_CxD, axis=1), plan.soft_cap)
    total_C = others_C + jnp.exp(z_C - top_C)
    loss_C = jax.nn.softplus(jnp.log(others_C) + top_C - z_C)  # also where total / exp(z) overflows
    coefficient_C = -others_C / total_C * slope_C
    d_hidden_CxD = None
    if pull_CxD is not None:
        d_hidden_CxD = pull_CxD / total_C[:, None] + coefficient_C[:, None] * target_CxD
        d_hidden_CxD = d_hidden_CxD.astype(hidden_CxD.dtype)
    return _Chunk(loss_C, top_C + jnp.log(total_C), coefficient_C, d_hidden_CxD)


def _add_table_gradient(
    plan: _Plan,
    d_table_VxD: jax.Array,
    hidden_CxD: jax.Array,
    table: Table,
    targets_C: jax.Array,
    chunk: _Chunk,
) -> jax.Array:
    """The table's gradient, float32, with a chunk's share."""

    def add_block(i: jax.Array | int, d_table_VxD: jax.Array) -> jax.Array:
        block = _block(plan, i, hidden_CxD, table, targets_C)
        weights_CxR = jnp.where(block.counted, jnp.exp(block.z - chunk.log_total[:, None]), 0)
        share_RxD = _product((weights_CxR * block.slope).astype(hidden_CxD.dtype), hidden_CxD, 0, 0)
        share_RxD += jax.lax.dynamic_slice_in_dim(d_table_VxD, block.first, plan.block_rows)
        return jax.lax.dynamic_update_slice_in_dim(d_table_VxD, share_RxD, block.first, 0)

    d_table_VxD = _for_each_block(plan, table, add_block, d_table_VxD)
    of_targets_CxD = chunk.target_coefficient[:, None] * hidden_CxD.astype(jnp.float32)
    return d_table_VxD.at[targets_C].add(of_targets_CxD)


def _soft_cap(logits: jax.Array, cap: float | None) -> tuple[jax.Array, jax.Array | float]:
    """The capped logits and their derivative."""
    if cap is None:
        return logits, 1.0
    tanh = jnp.tanh(logits * (1 / cap))
    return cap * tanh, 1 - tanh * tanh


def _product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The float32 product of two matrices over one axis of each."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


# --- Blocks of the table ------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """A chunk of C tokens with R rows of the table."""

    first: jax.Array  # int32, the first row
    table: jax.Array  # [R, D] in hidden's dtype
    z: jax.Array  # float32 [C, R], capped logits
    slope: jax.Array | float  # float32 [C, R], their derivative
    counted: jax.Array  # bool [C, R], False for the target, and for rows that an earlier block counted


def _for_each_block(plan: _Plan, table: Table, add: Any, start: Any) -> Any:
    if plan.block_rows == table.shape[0]:
        return add(0, start)
    return jax.lax.fori_loop(0, -(-table.shape[0] // plan.block_rows), add, start)


def _block(
    plan: _Plan, i: jax.Array | int, hidden_CxD: jax.Array, table: Table, targets_C: jax.Array
) -> _Block:
    vocabulary, rows = table.shape[0], plan.block_rows
    # The last block is shifted back to end with the table.
    first = jnp.minimum(i * rows, vocabulary - rows)
    table_RxD = _converted_rows(table, i, rows, hidden_CxD.dtype)
    z_CxR, slope_CxR = _soft_cap(_product(hidden_CxD, table_RxD, 1, 1), plan.soft_cap)
    row_R = first + jnp.arange(rows, dtype=jnp.int32)
    counted_CxR = row_R != targets_C[:, None]
    if vocabulary % rows:
        counted_CxR &= row_R >= i * rows
    return _Block(first, table_RxD, z_CxR, slope_CxR, counted_CxR)


def _with_plain_scales(table: Table) -> Table:
    """Undoes NF4's double quantization (1/16 byte a weight), so that every part can be cut by rows."""
    if isinstance(table, QuantizedTensor) and table.nested is not None and table.offset is not None:
        absmax = nf4.dequantize_absmax(table.absmax, table.nested, table.offset)
        return dataclasses.replace(table, absmax=absmax, nested=None, offset=None)
    return table


def _converted_rows(table: Table, i: jax.Array | int, rows: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Block i of the table, [rows, D] in `dtype`."""
    vocabulary = table.shape[0]
    # The barrier ties the table to the loop's counter. Without it XLA's CPU code, which slices bfloat16 as
    # float32, would convert the whole table ahead of the loop.
    table, i = jax.lax.optimization_barrier((table, jnp.int32(i)))

    def cut(part: jax.Array) -> jax.Array:
        size = part.shape[0] * rows // vocabulary
        return jax.lax.dynamic_slice_in_dim(part, jnp.minimum(i * size, part.shape[0] - size), size)

    block = table if rows == vocabulary else jax.tree.map(cut, table)
    return dequantize(block, dtype) if isinstance(block, QuantizedTensor) else block.astype(dtype)


def _rows(table: Table, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows `ids` [C] of the table, [C, D] in `dtype`."""
    table, ids = jax.lax.optimization_barrier((table, ids))  # as above
    return gather_rows(table, ids, dtype) if isinstance(table, QuantizedTensor) else table[ids].astype(dtype)
