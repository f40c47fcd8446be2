"""`gated_gelu.adapted` as two Triton kernels written in Pallas, which read and write each wide array once.

Forward, a program holds some tokens and runs through a share of the columns, adding up what down's A gives.
Backward, it holds some columns and runs through a share of the tokens, adding up the gradients of A and of
both B; the wide arrays' gradients are written on the way.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from keras_gemma_ft.ops import nvidia
from keras_gemma_ft.ops.dropout import kept, row_hash
from keras_gemma_ft.ops.nvidia import compiler_params, dot, plgpu

SLOPE, CUBIC = np.float32(2 * np.sqrt(2 / np.pi)), np.float32(0.044715)
BASE_2_SLOPE = np.float32(-SLOPE * np.log2(np.e))  # a GPU's exponential has base 2
BASE_2_CUBIC = np.float32(BASE_2_SLOPE * CUBIC)
WIDEST_RANK = 64


class Operands(NamedTuple):
    """What the nonlinearity and its adapters are computed from.

    Attributes:
        gate: [..., F], what the matrix alone gives.
        up: Likewise.
        low_gate: [..., r], the scaled output of gate's A, in gate's dtype.
        low_up: Likewise, of up's.
        b_gate: float32 [F, r], rounded to gate's dtype where it is multiplied.
        b_up: Likewise.
        a_down: float32 [r, F], likewise.
    """

    gate: jax.Array
    up: jax.Array
    low_gate: jax.Array
    low_up: jax.Array
    b_gate: jax.Array
    b_up: jax.Array
    a_down: jax.Array


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut.

    Attributes:
        tokens: Of a tile, a power of two, at least 16.
        columns: Of a tile, likewise.
        parts: Programs that share what one program would run through; fewer where tiles do not divide so.
        warps: Warps of a program.
        stages: Tiles in flight.
    """

    tokens: int
    columns: int
    parts: int
    warps: int = 4
    stages: int = 2


# The fastest of a few dozen at [8192, 10240] on an H200: 272 and 313 µs.
FORWARD, BACKWARD = Tiling(32, 64, parts=8, warps=2), Tiling(32, 32, parts=8, warps=2, stages=3)


def gelu_and_share(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """gelu(x) with the tanh approximation, and the share of x that it is; float32.

    (1 + tanh(u)) / 2 = sigmoid(2 u), which is fewer instructions.
    """
    share = 1 / (1 + jnp.exp2(x * (BASE_2_SLOPE + BASE_2_CUBIC * x * x)))
    return x * share, share


def gelu_slope(x: jax.Array, share: jax.Array) -> jax.Array:
    """gelu's derivative at x, from what `gelu_and_share` gives."""
    return share + x * share * (1 - share) * SLOPE * (1 + 3 * CUBIC * x * x)


def decline(given: Operands) -> None:
    """Declines what the kernels cannot compute here.

    Raises:
        NotImplementedError: Operands that are not 16-bit floats, sizes that do not divide into tiles, a rank
            above 64, no NVIDIA GPU of compute capability 8.0 or more, or a JAX without Pallas-Triton.
    """
    if plgpu is None:
        raise NotImplementedError("this JAX has no Triton backend for Pallas")
    tokens, width, rank = _sizes(given)
    if rank > WIDEST_RANK:
        raise NotImplementedError(f"needs a rank of at most {WIDEST_RANK}, got {rank}")
    for tiling in (FORWARD, BACKWARD):
        if tokens % tiling.tokens or width % tiling.columns:
            raise NotImplementedError(f"{tokens} tokens of width {width} do not divide into tiles")
    if given.gate.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {given.gate.dtype}")
    nvidia.require()


def adapted(
    given: Operands,
    rate: float,
    key: jax.Array | None,
    *,
    tilings: tuple[Tiling, Tiling] = (FORWARD, BACKWARD),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as in `gated_gelu.adapted`, of operands that `decline` lets pass, and:

    Args:
        tilings: Of the kernels forward and backward.
        interpret: Run the kernels' arithmetic in JAX, on any platform and in any dtype (slow).
    """
    tokens, _, rank = _sizes(given)
    flat = partial(jnp.reshape, shape=(tokens, -1))

    def thin(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, 0), (0, max(16, pl.next_power_of_2(rank)) - rank)))

    operands = Operands(
        flat(given.gate),
        flat(given.up),
        thin(flat(given.low_gate)),
        thin(flat(given.low_up)),
        thin(given.b_gate),
        thin(given.b_up),
        thin(given.a_down.T),
    )
    rate, key = (0.0, jnp.zeros((2,), jnp.uint32)) if key is None else (rate, key)
    product, low = _adapted(rate, tilings, interpret, operands, key)
    return product.reshape(given.gate.shape), low[:, :rank].reshape(given.low_gate.shape)


def _sizes(given: Operands) -> tuple[int, int, int]:
    """Tokens, width and rank."""
    *outer, width = given.gate.shape
    return math.prod(outer), width, given.low_gate.shape[-1]


# From here on gate and up are [M, F], both low [M, R], and all factors [F, R], A of down as well.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _adapted(rate, tilings, interpret, given, key):
    return forward(rate, tilings[0], interpret, given, key)


def _forward(rate, tilings, interpret, given, key):
    return forward(rate, tilings[0], interpret, given, key), (given, key)


def _backward(rate, tilings, interpret, residuals, gradients):
    return backward(rate, tilings[1], interpret, *residuals, *gradients), None


_adapted.defvjp(_forward, _backward)


def forward(
    rate: float, tiling: Tiling, interpret: bool, given: Operands, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The product [M, F] and low [M, R]."""
    tokens, width, rank = _sizes(given)
    parts = math.gcd(width // tiling.columns, tiling.parts)
    product, low = pl.pallas_call(
        partial(_forward_kernel, rate, tiling),
        grid=(tokens // tiling.tokens, parts),
        out_shape=(
            jax.ShapeDtypeStruct(given.gate.shape, given.gate.dtype),
            jax.ShapeDtypeStruct((parts, tokens, rank), jnp.float32),
        ),
        compiler_params=compiler_params(tiling),
        interpret=interpret,
        name="gated_gelu_forward",
    )(*_rounded(given), key)
    return product, low.sum(axis=0).astype(given.gate.dtype)


def _forward_kernel(rate, tiling, *refs):
    *operands, key_ref, product_ref, low_ref = refs
    given: Any = Operands(*operands)  # their references
    block, part = pl.program_id(0), pl.program_id(1)
    rows = pl.ds(block * tiling.tokens, tiling.tokens)
    low_gate, low_up = plgpu.load(given.low_gate.at[rows, :]), plgpu.load(given.low_up.at[rows, :])
    mask = _Mask(rate, key_ref, block * tiling.tokens, tiling.tokens)
    tiles = given.gate.shape[1] // (pl.num_programs(1) * tiling.columns)

    def step(i, low):
        first = (part * tiles + i) * tiling.columns
        columns = pl.ds(first, tiling.columns)
        x = plgpu.load(given.gate.at[rows, columns]).astype(jnp.float32)
        y = plgpu.load(given.up.at[rows, columns]).astype(jnp.float32)
        x += dot(low_gate, plgpu.load(given.b_gate.at[columns, :]), 1, 1)
        y += dot(low_up, plgpu.load(given.b_up.at[columns, :]), 1, 1)
        product = gelu_and_share(x)[0] * y
        plgpu.store(product_ref.at[rows, columns], product.astype(product_ref.dtype))
        dropped = mask(product, first).astype(product_ref.dtype)
        return low + dot(dropped, plgpu.load(given.a_down.at[columns, :]), 1, 0)

    zeros = jnp.zeros((tiling.tokens, low_ref.shape[2]), jnp.float32)
    plgpu.store(low_ref.at[part, rows, :], jax.lax.fori_loop(0, tiles, step, zeros))


def backward(
    rate: float,
    tiling: Tiling,
    interpret: bool,
    given: Operands,
    key: jax.Array,
    d_product: jax.Array,
    d_low: jax.Array,
) -> Operands:
    """The operands' gradients, those of the factors in float32."""
    tokens, width, _ = _sizes(given)
    parts = math.gcd(tokens // tiling.tokens, tiling.parts)
    wide = jax.ShapeDtypeStruct(given.gate.shape, given.gate.dtype)
    sums = jax.ShapeDtypeStruct((parts, *given.a_down.shape), jnp.float32)
    d_gate, d_up, *factors = pl.pallas_call(
        partial(_backward_kernel, rate, tiling),
        grid=(width // tiling.columns, parts),
        out_shape=(wide, wide, sums, sums, sums),
        input_output_aliases={0: 0, 1: 1},  # gate and up are not needed after this
        compiler_params=compiler_params(tiling),
        interpret=interpret,
        name="gated_gelu_backward",
    )(*_rounded(given), key, d_product, d_low)
    d_low_gate = dot(d_gate, given.b_gate.astype(d_gate.dtype), 1, 0).astype(given.low_gate.dtype)
    d_low_up = dot(d_up, given.b_up.astype(d_up.dtype), 1, 0).astype(given.low_up.dtype)
    return Operands(d_gate, d_up, d_low_gate, d_low_up, *(array.sum(axis=0) for array in factors))


def _backward_kernel(rate, tiling, *refs):
    *operands, key_ref, d_product_ref, d_low_ref = refs[:10]
    d_gate_ref, d_up_ref, *sum_refs = refs[10:]
    given: Any = Operands(*operands)  # their references
    block, part = pl.program_id(0), pl.program_id(1)
    columns = pl.ds(block * tiling.columns, tiling.columns)
    b_gate, b_up = plgpu.load(given.b_gate.at[columns, :]), plgpu.load(given.b_up.at[columns, :])
    a = plgpu.load(given.a_down.at[columns, :])
    tiles = given.gate.shape[0] // (pl.num_programs(1) * tiling.tokens)

    def step(i, sums):
        first = (part * tiles + i) * tiling.tokens
        rows = pl.ds(first, tiling.tokens)
        low_gate, low_up = plgpu.load(given.low_gate.at[rows, :]), plgpu.load(given.low_up.at[rows, :])
        d_low = plgpu.load(d_low_ref.at[rows, :])
        mask = _Mask(rate, key_ref, first, tiling.tokens)
        x = plgpu.load(given.gate.at[rows, columns]).astype(jnp.float32) + dot(low_gate, b_gate, 1, 1)
        y = plgpu.load(given.up.at[rows, columns]).astype(jnp.float32) + dot(low_up, b_up, 1, 1)
        d = plgpu.load(d_product_ref.at[rows, columns]).astype(jnp.float32)
        d += mask(dot(d_low, a, 1, 1), block * tiling.columns)
        gelu, share = gelu_and_share(x)
        d_gate = (d * y * gelu_slope(x, share)).astype(d_gate_ref.dtype)
        d_up = (d * gelu).astype(d_up_ref.dtype)
        plgpu.store(d_gate_ref.at[rows, columns], d_gate)
        plgpu.store(d_up_ref.at[rows, columns], d_up)
        dropped = mask(gelu * y, block * tiling.columns).astype(d_low.dtype)
        updates = (dot(d_gate, low_gate, 0, 0), dot(d_up, low_up, 0, 0), dot(dropped, d_low, 0, 0))
        return tuple(total + update for total, update in zip(sums, updates, strict=True))

    zeros = jnp.zeros(a.shape, jnp.float32)
    for ref, total in zip(sum_refs, jax.lax.fori_loop(0, tiles, step, (zeros,) * 3), strict=True):
        plgpu.store(ref.at[part, columns, :], total)


def _rounded(given: Operands) -> Operands:
    """The operands as the kernels multiply them."""
    return Operands(*(array.astype(given.gate.dtype) for array in given))


class _Mask:
    """The dropout of some rows of an array: what `dropout.drop` keeps, tile by tile."""

    def __init__(self, rate, key_ref, first, tokens):
        self.rate = rate
        if rate:
            self.key = key_ref[0], key_ref[1]
            self.rows = row_hash(_numbers(first, tokens), self.key)[:, None]

    def __call__(self, tile, first):
        """The tile [tokens, columns] whose first column is `first`, with zeros where elements are dropped."""
        if not self.rate:
            return tile
        columns = _numbers(first, tile.shape[1])[None, :]
        return jnp.where(kept(self.rows, columns, self.rate, self.key), tile, 0)


def _numbers(first, count):
    return (first + jnp.arange(count, dtype=jnp.int32)).astype(jnp.uint32)
