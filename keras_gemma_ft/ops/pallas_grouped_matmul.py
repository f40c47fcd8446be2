"""The grouped product as a Triton kernel written in Pallas, for NVIDIA GPUs.

The rows of each group are cut into tiles, aligned to the group's own start. Group sizes are known only on the
device, the number of tiles is not, but M/rows + E bounds it; programs beyond the true number return at once.
A small map made by XLA before the kernel tells each program its group and its rows, so a program multiplies
one tile of rows with one tile of one matrix: the loop of an ordinary matrix product, masked at the group's
last row.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from keras_gemma_ft.ops.nvidia import compiler_params, dot, plgpu


class TileMap(NamedTuple):
    """For each tile, int32 [tiles]: its group, its first row, and its group's end; unused tiles have start =
    end."""

    group: jax.Array
    start: jax.Array
    end: jax.Array
    used: jax.Array  # int32 [], how many are in use


def tile_map(group_sizes: jax.Array, rows: int, tile_rows: int) -> TileMap:
    """Cuts groups of int32 `group_sizes` [E], `rows` in all, into tiles of `tile_rows` rows."""
    groups = group_sizes.shape[0]
    most = rows // tile_rows + groups
    row_end = jnp.cumsum(group_sizes)
    tile_end = jnp.cumsum(pl.cdiv(group_sizes, tile_rows))
    tile = jnp.arange(most, dtype=jnp.int32)
    used = tile < tile_end[-1]
    group = jnp.where(used, jnp.searchsorted(tile_end, tile, side="right", method="compare_all"), groups - 1)
    first_tile = tile_end[group] - pl.cdiv(group_sizes, tile_rows)[group]
    start = row_end[group] - group_sizes[group] + (tile - first_tile) * tile_rows
    as_int32 = partial(jnp.asarray, dtype=jnp.int32)
    return TileMap(
        as_int32(group),
        as_int32(jnp.where(used, start, rows)),
        as_int32(jnp.where(used, row_end[group], rows)),
        as_int32(tile_end[-1]),
    )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut; the defaults are the fastest of benchmarks/experts.py on an H200.

    Attributes:
        rows: Rows of a tile.
        columns: Columns of a tile of the result.
        depth: Length of one step along the contracted axis.
        band: Tiles of rows that run through the columns together, so that they share what lies in L2.
        warps: Warps of a program.
        stages: Steps of the contracted axis in flight.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    band: int = 1
    warps: int = 8
    stages: int = 3


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    transposed: bool,
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """lhs [M, K] times its groups' matrices, rhs [E, N, K], to [M, N]; transposed: lhs [M, N] to [M, K].

    Raises:
        NotImplementedError: Operands that are not 16-bit floats, or a JAX without Pallas-Triton.
    """
    _decline(lhs, rhs, interpret)
    tiling = tiling or _tiling(lhs.shape[1], rhs.shape[2 if transposed else 1])
    rows, depth = lhs.shape
    columns = rhs.shape[2 if transposed else 1]
    tiles = tile_map(group_sizes, rows, tiling.rows)
    row_tiles, column_tiles = tiles.group.shape[0], pl.cdiv(columns, tiling.columns)
    row_tiles = pl.cdiv(row_tiles, tiling.band) * tiling.band
    spare = row_tiles - tiles.group.shape[0]
    group, start, end = (
        jnp.pad(array, (0, spare), constant_values=fill)
        for array, fill in ((tiles.group, 0), (tiles.start, rows), (tiles.end, rows))
    )
    return pl.pallas_call(
        partial(_product_kernel, tiling, column_tiles, depth, columns, transposed),
        grid=(row_tiles * column_tiles,),
        out_shape=jax.ShapeDtypeStruct((rows, columns), lhs.dtype),
        compiler_params=compiler_params(tiling),
        interpret=interpret,
        name="grouped_matmul",
    )(group, start, end, lhs, rhs)


def _product_kernel(
    tiling, column_tiles, depth, columns, transposed, group_ref, start_ref, end_ref, lhs_ref, rhs_ref, out_ref
):
    band, within = (
        pl.program_id(0) // (tiling.band * column_tiles),
        pl.program_id(0) % (tiling.band * column_tiles),
    )
    tile = band * tiling.band + within % tiling.band
    start, end = start_ref[tile], end_ref[tile]

    @pl.when(start < end)
    def _():
        group = group_ref[tile]
        rows = pl.ds(start, tiling.rows)
        column = (within // tiling.band) * tiling.columns
        wanted = pl.ds(column, tiling.columns)
        row_mask = (start + jnp.arange(tiling.rows) < end)[:, None]
        column_mask = column + jnp.arange(tiling.columns) < columns

        def step(i, total):
            slab = pl.ds(i * tiling.depth, tiling.depth)
            slab_mask = i * tiling.depth + jnp.arange(tiling.depth) < depth
            x = _load(lhs_ref.at[rows, slab], row_mask, slab_mask[None, :] if depth % tiling.depth else None)
            if transposed:
                masks = (
                    slab_mask[:, None] if depth % tiling.depth else None,
                    column_mask[None, :] if columns % tiling.columns else None,
                )
                return total + dot(x, _load(rhs_ref.at[group, slab, wanted], *masks), 1, 0)
            masks = (
                column_mask[:, None] if columns % tiling.columns else None,
                slab_mask[None, :] if depth % tiling.depth else None,
            )
            return total + dot(x, _load(rhs_ref.at[group, wanted, slab], *masks), 1, 1)

        zeros = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(depth, tiling.depth), step, zeros)
        plgpu.store(
            out_ref.at[rows, wanted], total.astype(out_ref.dtype), mask=row_mask & column_mask[None, :]
        )


def weight_gradient(
    lhs: jax.Array,
    d_out: jax.Array,
    group_sizes: jax.Array,
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The gradient of the groups' matrices, float32 [E, N, K], from lhs [M, K] and d_out [M, N].

    Raises:
        NotImplementedError: Operands that are not 16-bit floats, or a JAX without Pallas-Triton.
    """
    _decline(lhs, d_out, interpret)
    height, width = d_out.shape[1], lhs.shape[1]
    tiling = tiling or dataclasses.replace(_tiling(64, width), rows=min(128, _power_of_two(height)))
    groups = group_sizes.shape[0]
    end = jnp.cumsum(group_sizes).astype(jnp.int32)
    grid = (pl.cdiv(height, tiling.rows), pl.cdiv(width, tiling.columns), groups)
    return pl.pallas_call(
        partial(_weight_gradient_kernel, tiling, height, width),
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((groups, height, width), jnp.float32),
        compiler_params=compiler_params(tiling),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )(end - group_sizes, end, lhs, d_out)


def _weight_gradient_kernel(tiling, height, width, start_ref, end_ref, lhs_ref, d_out_ref, gradient_ref):
    group = pl.program_id(2)
    start, end = start_ref[group], end_ref[group]
    top, left = pl.program_id(0) * tiling.rows, pl.program_id(1) * tiling.columns
    tall, wide = pl.ds(top, tiling.rows), pl.ds(left, tiling.columns)
    tall_mask = top + jnp.arange(tiling.rows) < height
    wide_mask = left + jnp.arange(tiling.columns) < width

    def step(i, total):
        first = start + i * tiling.depth
        rows, mine = pl.ds(first, tiling.depth), (first + jnp.arange(tiling.depth) < end)[:, None]
        dy = _load(d_out_ref.at[rows, tall], mine, tall_mask[None, :] if height % tiling.rows else None)
        x = _load(lhs_ref.at[rows, wide], mine, wide_mask[None, :] if width % tiling.columns else None)
        return total + dot(dy, x, 0, 0)

    zeros = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(end - start, tiling.depth), step, zeros)
    plgpu.store(gradient_ref.at[group, tall, wide], total, mask=tall_mask[:, None] & wide_mask[None, :])


def _load(ref, *masks):
    """Loads a tile; where a mask is given and false, zeros."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return plgpu.load(ref)
    mask = given[0] if len(given) == 1 else given[0] & given[1]
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)


def _decline(lhs: jax.Array, rhs: jax.Array, interpret: bool) -> None:
    if plgpu is None:
        raise NotImplementedError("this JAX has no Triton backend for Pallas")
    if interpret:
        return
    if lhs.dtype not in (jnp.bfloat16, jnp.float16) or rhs.dtype != lhs.dtype:
        raise NotImplementedError(f"needs bfloat16 or float16 operands, got {lhs.dtype} and {rhs.dtype}")


def _tiling(depth: int, columns: int) -> Tiling:
    """The default tiling, narrowed to products as thin as a low-rank adapter's."""
    return Tiling(
        columns=min(Tiling.columns, _power_of_two(columns)), depth=min(Tiling.depth, _power_of_two(depth))
    )


def _power_of_two(size: int) -> int:
    """The smallest power of two ≥ size, at least 16, the narrowest tile of the matrix units."""
    return max(16, pl.next_power_of_2(size))
