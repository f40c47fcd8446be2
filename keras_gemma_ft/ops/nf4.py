"""NF4 with double-quantized scales, bit for bit as bitsandbytes 0.50 computes it on a CPU.

A weight is read row-major in blocks of 64 values. Each block is divided by its largest magnitude (`absmax`)
and every value becomes the index of the nearest of 16 levels, the quantiles of a normal distribution
(Dettmers et al., "QLoRA", 2023, arXiv:2305.14314, appendix E). Two indices share a byte, the first in the
high nibble. The scales are quantized in turn: their mean (`offset`) is subtracted, and blocks of 256 of them
become 8-bit indices into the "dynamic" map of "8-Bit Approximations for Parallelism in Deep Learning"
(Dettmers, 2015, arXiv:1511.04561) with a float32 scale each (`nested`). That is 0.5 + 1/64 + 4/(64·256) bytes
a weight: 4.127 bits.

The functions are plain JAX, so the same code quantizes on the host and on an accelerator, to the same bits:
division, whose last bit some backends get wrong, is done in integers, and no product feeds a sum that a
compiler could contract. Every function takes leading axes: a stack of matrices is quantized matrix by matrix.
"""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # weights that share one scale
NESTED_BLOCK = 256  # scales that share one nested scale

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_BOUNDS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)


@cache
def dynamic_map() -> np.ndarray:
    """The 256 ascending values of the signed 8-bit dynamic map, float32 [256].

    Decade i of seven (10^-6 … 1) holds 2^i values, the midpoints of 2^i equal steps from 0.1 to 1, and their
    negatives; 0 and 1 complete the 256. The rounding follows torch.linspace, which fuses its multiplication
    and addition and fills the upper half from the end.
    """
    magnitudes = []
    for decade in range(7):
        steps = 2**decade
        start, end = np.float64(np.float32(0.1)), np.float64(1)
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(steps))
        i = np.arange(steps + 1)
        edges = np.where(i < (steps + 1) // 2, start + step * i, end - step * (steps - i)).astype(np.float32)
        magnitudes.append(np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2)))
    values = np.concatenate([*magnitudes, *(-m for m in magnitudes), np.array([0, 1], np.float32)])
    return np.sort(values)


@cache
def _nearest_in_dynamic_map() -> np.ndarray:
    """The index of the nearest value of the dynamic map at 65,536 equal steps from -1 to 1, uint8."""
    values = dynamic_map()
    steps = np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535) - np.float32(1)
    midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
    return np.searchsorted(midpoints, steps, side="left").astype(np.uint8)


# --- Quantize -----------------------------------------------------------------------------------------------


def quantize_blocks(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes matrices to NF4 codes and float32 scales.

    Args:
        weight: [..., out, in], float32, bfloat16 or float16; `in` even and `out · in` a multiple of 64. Where
            `in` is no multiple of 64 the blocks run over row ends, as in bitsandbytes.

    Returns:
        Codes, uint8 [..., out, in/2], and absmax, float32 [..., out·in/64]. A block whose absmax is below the
        smallest normal float32 (1.2e-38) becomes zeros.

    Raises:
        ValueError: The matrix does not divide into blocks and bytes.
    """
    *stack, rows, columns = weight.shape
    if columns % 2 or (rows * columns) % BLOCK:
        raise ValueError(
            f"NF4 needs an even input width and out·in divisible by {BLOCK}, got [{rows}, {columns}]"
        )
    absmax = _largest_magnitudes(weight.reshape(*stack, -1, BLOCK))
    blocks = weight.reshape(*stack, -1, BLOCK).astype(jnp.float32)
    scaled = blocks * reciprocal(absmax)[..., None]
    indices = _nearest_level(scaled).astype(jnp.uint8)
    # Two bytes at once: XLA's CPU code is five times faster than with strided slices (1.1 GB/s of bfloat16).
    pairs = jax.lax.bitcast_convert_type(indices.reshape(*stack, rows, columns // 2, 2), jnp.uint16)
    return ((pairs << 4) | (pairs >> 8)).astype(jnp.uint8), absmax


def _largest_magnitudes(blocks: jax.Array) -> jax.Array:
    """The largest magnitude of each block [..., 64], float32 [...].

    Without their sign, floats are in the order of the integers that their bits spell. And one maximum over 64
    would be one number after the other in XLA's CPU code: 28 ms for [10240, 2560], where these two take 2.
    """
    unsigned = jnp.uint16 if blocks.dtype.itemsize == 2 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(blocks, unsigned) & (jnp.iinfo(unsigned).max >> 1)
    lanes = jax.lax.optimization_barrier(bits.reshape(*blocks.shape[:-1], 4, 16).max(axis=-2))
    return jax.lax.bitcast_convert_type(lanes.max(axis=-1), blocks.dtype).astype(jnp.float32)


def _nearest_level(scaled: jax.Array) -> jax.Array:
    """How many of the 15 bounds between levels lie below, int32, from the first bit to the last."""
    bits: list[jax.Array] = []
    index = jnp.zeros(scaled.shape, jnp.int32)
    for step in (8, 4, 2, 1):
        bounds = [_BOUNDS[first + step - 1] for first in range(0, 16, 2 * step)]
        bits.append(scaled > _selected(bits, bounds))
        index = (index << 1) | bits[-1].astype(jnp.int32)
    return index


def _selected(bits: Sequence[jax.Array], values: Sequence[np.float32]) -> jax.Array | np.float32:
    """Of 2^n values the one whose number the n bits spell, the highest first."""
    if not bits:
        return values[0]
    half = len(values) // 2
    low, high = _selected(bits[1:], values[:half]), _selected(bits[1:], values[half:])
    return jnp.where(bits[0], high, low)


def quantize_absmax(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantization: float32 scales [..., n] to codes uint8 [..., n], nested scales float32
    [..., ceil(n/256)] and offset float32 [...]."""
    *stack, count = absmax.shape
    offset = _divide(_sum_like_torch(absmax), jnp.float32(count))
    padding = -count % NESTED_BLOCK
    centred = jnp.pad(absmax - offset[..., None], [(0, 0)] * len(stack) + [(0, padding)])
    blocks = centred.reshape(*stack, -1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks * reciprocal(nested)[..., None]
    codes = jnp.asarray(_nearest_in_dynamic_map())[_step_of_65536(jnp.clip(scaled, -1, 1))]
    codes = jnp.where((nested == 0)[..., None], jnp.uint8(0), codes)
    return codes.reshape(*stack, -1)[..., :count], nested, offset


def _step_of_65536(scaled: jax.Array) -> jax.Array:
    """The integer part of fma((scaled + 1) / 2, 65535, 0.5), rounded once to float32, for scaled in [-1, 1].

    In integers, because whether a compiler fuses the multiplication and the addition is not ours to say. The
    sum of a float32 in [-1, 1] and 1 is a multiple of 2^-24, so half of it is n · 2^-25 with an integer n.
    """
    n = ((scaled + 1) * np.float32(2**24)).astype(jnp.int32)
    numerator = (n & 511) * 65536 - n + 2**24  # value = (n >> 9) + numerator / 2^25
    whole = (n >> 9) + (numerator >> 25)
    fraction = numerator & (2**25 - 1)
    exponent = 31 - jax.lax.clz(whole)  # of the value's float32; -1 for a value below 1, from clz(0) = 32
    half_unit = jnp.left_shift(1, exponent + 1)  # half of its last place, in units of 2^-25
    return whole + (fraction + half_unit >= 2**25)


def reciprocal(magnitude: jax.Array) -> jax.Array:
    """1 / magnitude in float32, rounded as IEEE says on every backend; 1 where magnitude is below 1.2e-38."""
    normal = magnitude >= np.finfo(np.float32).tiny
    return _divide(jnp.float32(1), jnp.where(normal, magnitude, 1))


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Correctly rounded quotient of positive, normal float32 (IEEE), by long division of the mantissas.

    A quotient below the smallest normal float32, and that of 0 and a denominator of at least 1, is 0; one
    above the largest is infinite.
    """
    numerator, denominator = jnp.broadcast_arrays(numerator, denominator)

    def parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return (bits & 0x7FFFFF) | 0x800000, (bits >> 23).astype(jnp.int32)

    (high, high_exponent), (low, low_exponent) = parts(numerator), parts(denominator)
    smaller = high < low
    remainder = jnp.where(smaller, high << 1, high)
    quotient = jnp.ones_like(low)
    remainder -= low
    for bits in (8, 8, 7):  # remainder < 2^24, so 8 bits at a time stay within 32
        remainder <<= bits
        quotient = (quotient << bits) | (remainder // low)
        remainder %= low
    quotient += (2 * remainder > low).astype(jnp.uint32)  # a quotient of two float32 is never a tie
    exponent = high_exponent - low_exponent - smaller + 127
    mantissa = quotient.astype(jnp.int32) - (1 << 23)
    value = jax.lax.bitcast_convert_type((exponent << 23) + mantissa, jnp.float32)
    return jnp.where(exponent < 1, jnp.float32(0), jnp.where(exponent > 254, jnp.float32(np.inf), value))


def _sum_like_torch(values: jax.Array) -> jax.Array:
    """float32 sum over the last axis in the order of torch's CPU kernel, ATen/native/cpu/SumKernel.cpp.

    Float addition is not associative, and the offset's last bit decides codes. Eight SIMD lanes times four
    accumulators run down the values; every 16 rows the accumulators move up a level, four levels in all.
    """
    lanes, accumulators = 8, 4
    width = lanes * accumulators
    *stack, count = values.shape
    vectors, rows = count // lanes, count // width
    table = values[..., : rows * width].reshape(*stack, rows, width)
    step = 1 << max(4, (max(rows, 1) - 1).bit_length() // 4)
    levels = []
    for _ in range(3):
        full = table.shape[-2] // step * step
        levels.append(_add_in_order(table[..., full:, :]))
        table = _add_in_order(table[..., :full, :].reshape(*stack, full // step, step, width))
    levels.append(_add_in_order(table))
    total = levels[0] + levels[1] + levels[2] + levels[3]
    partial = [total[..., i * lanes : (i + 1) * lanes] for i in range(accumulators)]
    leftover = values[..., rows * width : vectors * lanes].reshape(*stack, -1, lanes)
    for i in range(leftover.shape[-2]):
        partial[0] += leftover[..., i, :]
    vector = partial[0] + partial[1] + partial[2] + partial[3]
    last = jnp.concatenate([values[..., vectors * lanes :], vector], axis=-1)
    return _add_in_order(last[..., None])[..., 0]


def _add_in_order(rows: jax.Array) -> jax.Array:
    """Sums [..., n, width] over n, first to last."""
    start = jnp.zeros((*rows.shape[:-2], rows.shape[-1]), rows.dtype)
    if not rows.shape[-2]:
        return start
    return jax.lax.fori_loop(
        0, rows.shape[-2], lambda i, total: total + jax.lax.dynamic_index_in_dim(rows, i, -2, False), start
    )


# --- Dequantize ---------------------------------------------------------------------------------------------


def dequantize_absmax(codes: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
    """The float32 scales [..., n] of codes uint8 [..., n], nested [..., ceil(n/256)] and offset [...]."""
    *stack, count = codes.shape
    padded = jnp.pad(codes, [(0, 0)] * len(stack) + [(0, -count % NESTED_BLOCK)])
    blocks = padded.reshape(*stack, -1, NESTED_BLOCK)
    return _scale(blocks, nested[..., None], offset[..., None, None]).reshape(*stack, -1)[..., :count]


def _scale(codes: jax.Array, nested: jax.Array, offset: jax.Array) -> jax.Array:
    product = jnp.asarray(dynamic_map())[codes] * nested
    # The maximum changes no value. It stands between the product and the sum, so that no compiler contracts
    # the two into one fused operation, which would round differently from bitsandbytes.
    return jnp.maximum(product, np.finfo(np.float32).min) + offset


def dequantize_blocks(codes: jax.Array, absmax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """NF4 codes uint8 [..., out, in/2] and float32 scales [..., out·in/64] to weights [..., out, in].

    Elementwise up to one table of 16 levels, so that XLA writes the weights in a single fusion.
    """
    *stack, rows, half = codes.shape
    if jnp.dtype(dtype).itemsize != 2:
        values = _levels(codes).reshape(*stack, -1, BLOCK) * absmax[..., None]
        return values.astype(dtype).reshape(*stack, rows, 2 * half)
    # Both weights of a byte in one 32-bit word: half as many indices to compute, and half as many scales to
    # read. On an H200 [21504, 5376] take 95 µs so, and 168 weight by weight.
    pairs = codes.reshape(*stack, -1, BLOCK // 2).astype(jnp.uint32)
    first, second = (
        jax.lax.bitcast_convert_type(
            (jnp.asarray(LEVELS)[nibbles] * absmax[..., None]).astype(dtype), jnp.uint16
        ).astype(jnp.uint32)
        for nibbles in (pairs >> 4, pairs & 15)
    )
    words = jax.lax.bitcast_convert_type(first | second << 16, dtype)  # its first half is the low one
    return words.reshape(*stack, rows, 2 * half)


def _levels(codes: jax.Array) -> jax.Array:
    """The float32 levels [..., 2·n] of packed codes [..., n]."""
    nibbles = (codes[..., None] >> jnp.array([4, 0], jnp.uint8)) & 15
    return jnp.asarray(LEVELS)[nibbles].reshape(*codes.shape[:-1], -1)


def dequantize_rows(
    codes: jax.Array,
    absmax: jax.Array,
    nested: jax.Array | None,
    offset: jax.Array | None,
    ids: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Rows `ids` [...] of one matrix of codes [out, in/2] as weights [..., in]; reads those rows only."""
    columns = 2 * codes.shape[-1]
    block = _blocks_of_rows(ids, columns)
    scales = absmax[block]
    if nested is not None and offset is not None:
        scales = _scale(scales, nested[block // NESTED_BLOCK], offset)
    values = _levels(codes[ids]).reshape(*block.shape, -1) * scales[..., None]
    return values.astype(dtype).reshape(*ids.shape, columns)


def _blocks_of_rows(ids: jax.Array, columns: int) -> jax.Array:
    """The blocks that rows `ids` [...] of a flattened matrix run through, [..., runs].

    One for each run, the longest stretch of columns that never crosses a block's border.
    """
    run = int(np.gcd(columns, BLOCK))
    runs = columns // run  # counted in runs, not in weights: a table may hold more than 2^31 of these
    return (ids[..., None] * runs + np.arange(runs, dtype=np.int32)) // (BLOCK // run)
