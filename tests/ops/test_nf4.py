"""NF4 against bitsandbytes on the CPU, bit for bit, and the exact arithmetic underneath."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_gemma_ft.ops import nf4

SHAPES = [(64, 64), (1000, 2560), (2048, 1536), (256, 704), (32, 34), (3, 64 * 257)]


@pytest.fixture(scope="module")
def bnb() -> Any:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's float32 mean depends on the number of threads; ours is that of one
    yield pytest.importorskip("bitsandbytes.functional")
    torch.set_num_threads(threads)


def weights(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Normal weights whose rows differ in scale, so that the block scales spread."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape) * 0.05 * generator.uniform(0.01, 1, size=(*shape[:-1], 1))
    return np.asarray(jnp.asarray(values, dtype))


@jax.jit
def ours(weight: jax.Array) -> dict[str, jax.Array]:
    codes, scales = nf4.quantize_blocks(weight)
    absmax, nested, offset = nf4.quantize_absmax(scales)
    return {"codes": codes, "absmax": absmax, "nested": nested, "offset": offset}


@jax.jit
def restored(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    scales = nf4.dequantize_absmax(parts["absmax"], parts["nested"], parts["offset"])
    return {
        dtype: nf4.dequantize_blocks(parts["codes"], scales, dtype)
        for dtype in ("float32", "bfloat16", "float16")
    }


def theirs(bnb: Any, weight: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    import torch

    tensor = torch.from_numpy(weight.astype(np.float32)).to(getattr(torch, str(weight.dtype)))
    codes, state = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
    values = {}
    for dtype in ("float32", "bfloat16", "float16"):
        state.dtype = getattr(torch, dtype)
        values[dtype] = bnb.dequantize_4bit(codes, state).float().numpy()
    parts = {"codes": codes, "absmax": state.absmax, "nested": state.state2.absmax, "offset": state.offset}
    return {name: part.numpy() for name, part in parts.items()}, values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_equals_bitsandbytes(bnb: Any, shape: tuple[int, int], dtype: str) -> None:
    weight = weights(shape, dtype)
    parts = ours(weight)
    expected, expected_values = theirs(bnb, weight)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(parts[name]).ravel(), array.ravel(), err_msg=name)
    for name, array in expected_values.items():
        values = np.asarray(restored(parts)[name].astype(jnp.float32))
        np.testing.assert_array_equal(values.ravel(), array.ravel(), err_msg=f"dequantized to {name}")


def test_more_scales_than_one_level_of_the_sum(bnb: Any) -> None:
    """163,840 scales: torch's sum runs through all of its levels, and the offset's last bit decides codes."""
    weight = weights((4096, 2560), "bfloat16", seed=1)
    parts = ours(weight)
    expected, _ = theirs(bnb, weight)
    assert parts["offset"] == expected["offset"]
    np.testing.assert_array_equal(parts["absmax"], expected["absmax"])
    np.testing.assert_array_equal(parts["nested"], expected["nested"])


def test_zero_blocks_and_constant_scales(bnb: Any) -> None:
    weight = weights((8, 256), "float32").copy()
    weight[0], weight[1, 64:128] = 0, 0
    constant = np.tile(np.linspace(-1, 1, 64, dtype=np.float32), (4, 2))  # every scale equals the offset
    for matrix in (weight, constant, np.zeros((2, 64), np.float32)):
        parts = ours(matrix)
        expected, values = theirs(bnb, matrix)
        np.testing.assert_array_equal(np.asarray(parts["codes"]).ravel(), expected["codes"].ravel())
        np.testing.assert_array_equal(parts["absmax"], expected["absmax"])
        np.testing.assert_array_equal(restored(parts)["float32"], values["float32"])


def test_the_first_weight_of_a_pair_is_the_high_nibble() -> None:
    codes, _ = nf4.quantize_blocks(jnp.zeros((1, 64)).at[0, 0].set(-1.0).at[0, 1].set(1.0))
    assert codes[0, 0] == 0x0F  # level 0 is -1 and goes high, level 15 is 1 and goes low
    assert codes[0, 1] == 0x77  # level 7 is 0


def test_the_dynamic_map_equals_bitsandbytes(bnb: Any) -> None:
    np.testing.assert_array_equal(nf4.dynamic_map(), bnb.create_dynamic_map().numpy())


def test_blocks_over_row_ends_follow_the_flattened_matrix() -> None:
    """An input width of 96: the second block starts in the first row.

    bitsandbytes 0.50 quantizes so too, but its CPU kernel then dequantizes with the wrong scales: it takes
    every row to start a block. Its portable formula is the reference here.
    """
    weight = weights((8, 96), "float32")
    parts = ours(weight)
    scales = np.asarray(nf4.dequantize_absmax(parts["absmax"], parts["nested"], parts["offset"]))
    codes = np.asarray(parts["codes"]).ravel()
    indices = np.stack([codes >> 4, codes & 15], axis=-1).ravel()
    expected = (nf4.LEVELS[indices].reshape(-1, 64) * scales[:, None]).reshape(8, 96)
    np.testing.assert_array_equal(restored(parts)["float32"], expected)
    assert np.abs(expected - weight).max() < 0.2 * np.abs(weight).max()


def test_a_stack_is_quantized_matrix_by_matrix() -> None:
    stack = weights((2, 3, 16, 128), "float32")
    together = ours(stack)
    for group in range(2):
        for layer in range(3):
            alone = ours(stack[group, layer])
            for name, part in alone.items():
                np.testing.assert_array_equal(together[name][group, layer], part, err_msg=name)


def test_block_numbers_of_a_huge_table_do_not_overflow() -> None:
    """E4B's per-layer table has 262,144 x 10,752 weights, more than an int32 counts."""
    last = jax.jit(nf4._blocks_of_rows, static_argnums=1)(jnp.array([262_143]), 10_752)
    assert last[0, 0] == 262_143 * 10_752 // 64
    assert last[0, -1] == 262_144 * 10_752 // 64 - 1


@pytest.mark.parametrize("shape", [(4, 33), (3, 96), (7, 32)])
def test_a_matrix_that_does_not_divide_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="divisible by 64"):
        nf4.quantize_blocks(jnp.zeros(shape))


divide = jax.jit(nf4._divide)
positive = st.floats(2.0**-100, 2.0**100, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(positive, positive), min_size=64, max_size=64))
def test_division_is_rounded_as_ieee_says(pairs: list[tuple[float, float]]) -> None:
    numerator, denominator = np.array(pairs, np.float32).T
    with np.errstate(over="ignore", under="ignore"):
        quotient = numerator / denominator
    quotient[quotient < np.finfo(np.float32).tiny] = 0
    np.testing.assert_array_equal(divide(numerator, denominator), quotient)


def test_nothing_divided_by_a_count_is_nothing() -> None:
    np.testing.assert_array_equal(divide(np.zeros(3, np.float32), np.array([1, 2, 3], np.float32)), 0)


def test_the_step_of_65536_equals_a_fused_multiply_and_add() -> None:
    """float64 holds the product and the sum exactly, so rounding it to float32 once is what an FMA does."""
    steps = np.arange(65536, dtype=np.float64)
    near = (np.float32(2 / 65535) * (steps + np.array([[-0.5], [0.0], [0.5]])) - 1).astype(np.float32).ravel()
    edges = np.concatenate([near, np.nextafter(near, np.float32(2)), np.nextafter(near, np.float32(-2))])
    scaled = np.clip(np.concatenate([edges, np.random.default_rng(0).uniform(-1, 1, 10**6)]), -1, 1)
    scaled = scaled.astype(np.float32)
    half = ((scaled + np.float32(1)) * np.float32(0.5)).astype(np.float64)
    expected = (half * 65535 + 0.5).astype(np.float32).astype(np.int32)
    np.testing.assert_array_equal(jax.jit(nf4._step_of_65536)(scaled), expected)


@pytest.mark.parametrize("count", [1, 7, 8, 31, 40, 511, 512, 8191, 300_000])
def test_the_sum_follows_torch(count: int, bnb: Any) -> None:
    import torch

    values = np.random.default_rng(count).uniform(0.001, 1, count).astype(np.float32)
    total = jax.jit(nf4._sum_like_torch)(values)
    assert total == torch.from_numpy(values).sum().item()
