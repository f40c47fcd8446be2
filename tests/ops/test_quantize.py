"""Quantized tensors: stacks, rows, products with their gradients, and files."""

from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_gemma_ft.ops.quantize import (
    Kind,
    QuantizedTensor,
    dequantize,
    from_arrays,
    gather_rows,
    linear,
    quantize,
    quantize_pieces,
    to_arrays,
)

KINDS = [("nf4", True), ("nf4", False), ("int8", True)]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool(jnp.array_equal(a, b)), left, right)
    return all(jax.tree.leaves(equal))


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_tensor_knows_its_shape_and_size(kind: Kind, double: bool) -> None:
    tensor = quantize(normal(3, 64, 256), kind, double)
    assert tensor.shape == (3, 64, 256)
    assert tensor[1].shape == (64, 256)
    expected = {"nf4": 0.5 + 1 / 64 + 4 / 64 / 256 if double else 0.5 + 4 / 64, "int8": 1 + 4 / 256}[kind]
    assert tensor.nbytes == pytest.approx(3 * 64 * 256 * expected, abs=3 * 4)  # the offsets


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.11), ("int8", 0.012)])
def test_dequantized_weights_are_close(kind: Kind, error: float) -> None:
    weight = normal(32, 256)
    difference = jnp.linalg.norm(dequantize(quantize(weight, kind), jnp.float32) - weight)
    assert 0 < difference / jnp.linalg.norm(weight) < error


def test_int8_is_within_half_a_step_of_each_row() -> None:
    weight = normal(16, 128) * jnp.arange(16)[:, None]  # the first row is zero
    steps = jnp.max(jnp.abs(weight), axis=-1, keepdims=True) / 127
    error = jnp.abs(dequantize(quantize(weight, "int8"), jnp.float32) - weight)
    assert jnp.all(error <= steps * 0.5001)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp4'"):
        quantize(normal(4, 64), cast(Kind, "fp4"))


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_scan_slices_a_stack(kind: Kind, double: bool) -> None:
    stack = quantize(normal(4, 64, 64), kind, double)
    x = normal(8, 64, seed=1)
    scanned, _ = jax.lax.scan(lambda carry, layer: (linear(carry, layer) / 8, None), x, stack)
    looped = x
    for i in range(4):
        looped = looped @ dequantize(stack, jnp.float32)[i].T / 8
    np.testing.assert_allclose(scanned, looped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_linear_and_its_gradient_equal_the_dense_product(
    kind: Kind, double: bool, leading: tuple[int, ...]
) -> None:
    tensor = quantize(normal(48, 128), kind, double)
    x, dy = normal(*leading, 128, seed=1), normal(*leading, 48, seed=2)
    y, backward = jax.vjp(lambda x: linear(x, tensor), x)
    dense = np.asarray(dequantize(tensor, jnp.float32), np.float64)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ dense.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(backward(dy)[0], np.asarray(dy, np.float64) @ dense, rtol=1e-4, atol=1e-4)


def test_linear_keeps_nothing_but_the_quantized_weight() -> None:
    tensor = quantize(normal(64, 128))
    _, backward = jax.vjp(lambda x: linear(x, tensor), normal(8, 128).astype(jnp.bfloat16))
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    assert kept == tensor.nbytes


def test_linear_works_under_remat_and_scan_with_a_bf16_input() -> None:
    stack = quantize(normal(3, 64, 64))

    def loss(x: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda carry, layer: (jnp.tanh(linear(carry, layer)), None))
        return jnp.sum(jax.lax.scan(body, x, stack)[0].astype(jnp.float32))

    def dense_loss(x: jax.Array) -> jax.Array:
        for weight in dequantize(stack, jnp.float32):
            x = jnp.tanh(x @ weight.T)
        return jnp.sum(x)

    x = normal(4, 64) / 8
    gradient = jax.jit(jax.grad(loss))(x.astype(jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    expected = jax.grad(dense_loss)(x)
    assert jnp.linalg.norm(gradient - expected) < 0.05 * jnp.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "double", "width"),
    [("nf4", True, 34), ("nf4", True, 96), ("nf4", True, 256), ("nf4", False, 96), ("int8", True, 96)],
)
def test_gathered_rows_equal_the_dequantized_table(kind: Kind, double: bool, width: int) -> None:
    """Rows of 34 and 96 weights share blocks with their neighbours."""
    table = quantize(normal(160, width), kind, double)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, table.shape[0], (4, 5)))
    for dtype in (jnp.float32, jnp.bfloat16):
        rows = jax.jit(gather_rows, static_argnums=2)(table, ids, dtype)
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, jax.jit(dequantize, static_argnums=1)(table, dtype)[ids])


def test_gathering_touches_no_other_row() -> None:
    """No intermediate of the look-up is as large as the table, were it only its scales."""
    table = quantize(normal(4096, 128))
    jaxpr = jax.make_jaxpr(lambda table, ids: gather_rows(table, ids))(table, jnp.arange(3))
    largest = max(out.aval.size for equation in jaxpr.eqns for out in equation.outvars)
    assert largest < 4096


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_pieces_equal_the_whole(kind: Kind, double: bool) -> None:
    weight = normal(96, 128)
    pieces = [np.asarray(weight[:32]), np.asarray(weight[32:40]), np.asarray(weight[40:])]
    assert same(quantize_pieces(iter(pieces), kind, double), quantize(weight, kind, double))


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_file_gives_the_same_bits_back(tmp_path: Path, kind: Kind, double: bool) -> None:
    first, second = quantize(normal(2, 64, 64), kind, double), quantize(normal(4, 128, seed=1), kind, double)
    np.savez(tmp_path / "model.npz", **to_arrays(first, "layers.q"), **to_arrays(second, "layers.q_proj"))
    with np.load(tmp_path / "model.npz") as arrays:
        assert same(from_arrays(arrays, "layers.q"), first)
        assert same(from_arrays(arrays, "layers.q_proj"), second)
        with pytest.raises(KeyError, match="named 'layers"):
            from_arrays(arrays, "layers.k")
