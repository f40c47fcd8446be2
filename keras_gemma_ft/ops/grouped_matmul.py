"""Products of sorted rows with one matrix for each group: the arithmetic of a mixture of experts.

Rows [M, K] are sorted by group; group e owns `group_sizes[e]` consecutive rows and the matrix `rhs[e]` [N,
K]. `grouped_matmul` multiplies every row by its own group's matrix only. Four rungs compute it:

- "reference": every group's matrix times all rows, masked. The definition; costs the number of groups more.
- "tiled": plain XLA, one tile of rows after the other. Exact on every platform, for CPU the fastest.
- "ragged": `jax.lax.ragged_dot`, which TPUs have a kernel for. On GPU it is unusable (jax 0.11.2, H200:
  65,536 rows x 128 groups of [1408, 2816] take 116 ms and 44 GiB).
- "pallas": Triton through Pallas, for NVIDIA GPUs. See `pallas_grouped_matmul.py`.

A rung that cannot serve a call raises NotImplementedError with the reason.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from keras_gemma_ft.ops import pallas_grouped_matmul
from keras_gemma_ft.ops.quantize import Quantized, dequantized_after

Implementation = Literal["auto", "reference", "tiled", "ragged", "pallas", "pallas_interpret"]
Weight: TypeAlias = jax.Array | Quantized


def grouped_matmul(
    lhs: jax.Array, rhs: Weight, group_sizes: jax.Array, implementation: Implementation = "auto"
) -> jax.Array:
    """Multiplies each row with its group's matrix: out[m] = rhs[group(m)] @ lhs[m].

    Differentiable in `lhs`, and in `rhs` where that is an array. The weight gradient is computed, and `lhs`
    kept for it, only when `rhs` is differentiated. A quantized `rhs` is dequantized anew in each pass.

    Args:
        lhs: [M, K], rows sorted by group.
        rhs: [E, N, K], an array or a quantized stack.
        group_sizes: int32 [E]; their sum must be M.
        implementation: A rung, or "auto": "pallas" on GPU, "ragged" on TPU, and "tiled" elsewhere or where
            those decline.

    Returns:
        [M, N] in lhs's dtype, accumulated in float32.

    Raises:
        NotImplementedError: The rung declines; the message says why.
    """
    return _grouped_matmul(implementation, lhs, rhs, group_sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    implementation: Implementation, lhs: jax.Array, rhs: Weight, group_sizes: jax.Array
) -> jax.Array:
    lhs, dense = _with_dense(lhs, rhs)
    return _first_willing(implementation, "product", lhs, dense, group_sizes, False)


def _forward(implementation, lhs, rhs, group_sizes):
    train_rhs = not isinstance(rhs, Quantized) and rhs.perturbed
    lhs, rhs, group_sizes = jax.tree.map(lambda leaf: leaf.value, (lhs, rhs, group_sizes), is_leaf=_is_primal)
    out = _grouped_matmul(implementation, lhs, rhs, group_sizes)
    return out, (lhs if train_rhs else None, rhs, group_sizes)


def _backward(implementation, residuals, d_out):
    lhs, rhs, group_sizes = residuals
    if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    d_out, dense = _with_dense(d_out, rhs)
    d_lhs = _first_willing(implementation, "product", d_out, dense, group_sizes, True)
    if lhs is None:
        return d_lhs, None, None
    d_rhs = _first_willing(implementation, "weight_gradient", lhs, d_out, group_sizes)
    return d_lhs, d_rhs.astype(rhs.dtype), None


def _is_primal(leaf: object) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _with_dense(rows: jax.Array, rhs: Weight) -> tuple[jax.Array, jax.Array]:
    return dequantized_after(rows, rhs)[:2] if isinstance(rhs, Quantized) else (rows, rhs.astype(rows.dtype))


# --- The ladder ---------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """One way to compute the products.

    product(lhs, rhs, group_sizes, transposed): lhs [M, K] with rhs [E, N, K] gives [M, N]; transposed, lhs
        [M, N] with the same rhs gives [M, K].
    weight_gradient(lhs [M, K], d_out [M, N], group_sizes): float32 [E, N, K].
    """

    product: Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
    weight_gradient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _first_willing(implementation: Implementation, part: str, *arguments: Any) -> jax.Array:
    """Runs `part` of the first rung that does not decline: the one asked for, or the platform's in order."""
    if implementation == "auto":
        order = _ORDER.get(jax.default_backend(), ("tiled",))
    elif implementation in RUNGS:
        order = (implementation,)
    else:
        raise ValueError(f"implementation must be auto or one of {', '.join(RUNGS)}, got {implementation!r}")
    declined: list[str] = []
    for name in order:
        try:
            result = getattr(RUNGS[name], part)(*arguments)
        except NotImplementedError as reason:
            declined.append(f"{name} declines: {reason}")
            continue
        _log_choice(name, *declined)
        return result
    raise NotImplementedError("; ".join(declined))


@cache
def _log_choice(*choice: str) -> None:
    """Logs each choice once a process."""
    logging.getLogger(__name__).info("grouped_matmul runs on %s", "; ".join(choice))


def _one_hot_rows(group_sizes: jax.Array, rows: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[M, E]: 1 where the row belongs to the group."""
    ends = jnp.cumsum(group_sizes)[None, :]
    row = jnp.arange(rows)[:, None]
    return ((row < ends) & (row >= ends - group_sizes)).astype(dtype)


def _reference(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    members = _one_hot_rows(group_sizes, lhs.shape[0], lhs.dtype)
    matrix = "enk,me->mk" if transposed else "enk,me->mn"
    source = "mn," if transposed else "mk,"
    return jnp.einsum(source + matrix, lhs, rhs, members, preferred_element_type=jnp.float32).astype(
        lhs.dtype
    )


def _reference_weight_gradient(lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    members = _one_hot_rows(group_sizes, lhs.shape[0], lhs.dtype)
    return jnp.einsum("mk,mn,me->enk", lhs, d_out, members, preferred_element_type=jnp.float32)


_TILE_ROWS = 64


def _tiled(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    tiles = pallas_grouped_matmul.tile_map(group_sizes, lhs.shape[0], _TILE_ROWS)
    padded = jnp.pad(lhs, ((0, _TILE_ROWS), (0, 0)))
    out = jnp.zeros((padded.shape[0], rhs.shape[1 + transposed]), lhs.dtype)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, tiles.start[i], _TILE_ROWS)
        contracted = (((1,), (0 if transposed else 1,)), ((), ()))
        values = jax.lax.dot_general(
            rows, rhs[tiles.group[i]], contracted, preferred_element_type=jnp.float32
        )
        # Tiles come in the order of their rows: what one writes past its end, the next overwrites.
        return jax.lax.dynamic_update_slice_in_dim(out, values.astype(lhs.dtype), tiles.start[i], 0)

    return jax.lax.fori_loop(0, tiles.used, body, out)[: lhs.shape[0]]


def _tiled_weight_gradient(lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    tiles = pallas_grouped_matmul.tile_map(group_sizes, lhs.shape[0], _TILE_ROWS)
    lhs, d_out = (jnp.pad(array, ((0, _TILE_ROWS), (0, 0))) for array in (lhs, d_out))

    def body(i: jax.Array, gradient: jax.Array) -> jax.Array:
        start = tiles.start[i]
        mine = (start + jnp.arange(_TILE_ROWS) < tiles.end[i])[:, None]
        x, dy = (jax.lax.dynamic_slice_in_dim(array, start, _TILE_ROWS) for array in (lhs, d_out))
        update = jax.lax.dot_general(
            jnp.where(mine, dy, 0), x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return gradient.at[tiles.group[i]].add(update)

    shape = (group_sizes.shape[0], d_out.shape[1], lhs.shape[1])
    return jax.lax.fori_loop(0, tiles.used, body, jnp.zeros(shape, jnp.float32))


def _ragged(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    rhs = rhs if transposed else rhs.swapaxes(1, 2)
    return jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32).astype(lhs.dtype)


def _ragged_weight_gradient(lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(d_out, lhs, group_sizes, dimensions, preferred_element_type=jnp.float32)


RUNGS: dict[str, Rung] = {
    "reference": Rung(_reference, _reference_weight_gradient),
    "tiled": Rung(_tiled, _tiled_weight_gradient),
    "ragged": Rung(_ragged, _ragged_weight_gradient),
    "pallas": Rung(pallas_grouped_matmul.product, pallas_grouped_matmul.weight_gradient),
    "pallas_interpret": Rung(
        partial(pallas_grouped_matmul.product, interpret=True),
        partial(pallas_grouped_matmul.weight_gradient, interpret=True),
    ),
}
_ORDER = {"gpu": ("pallas", "tiled"), "tpu": ("ragged", "tiled")}
