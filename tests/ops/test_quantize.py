"""Quantized tensors: stacks, rows, products with their gradients, and files."""

import itertools
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import depends_on, equations

from keras_gemma_ft.ops.quantize import (
    Kind,
    Placed,
    QuantizedTensor,
    dequantize,
    from_arrays,
    gather_rows,
    linears,
    quantize,
    quantize_pieces,
    to_arrays,
)

KINDS = [("nf4", True), ("nf4", False), ("int8", True)]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def linear(x: jax.Array, matrix: QuantizedTensor | Placed) -> jax.Array:
    return linears(x, [matrix])[0]


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


@pytest.mark.parametrize(("kind", "double"), KINDS)
@pytest.mark.parametrize("place", [(2,), (1, 2)])
def test_a_placed_matrix_is_that_of_its_place(kind: Kind, double: bool, place: tuple[int, ...]) -> None:
    stack = quantize(normal(*(3,) * len(place), 48, 128), kind, double)
    placed, x, dy = Placed(stack, jnp.array(place)), normal(5, 128, seed=1), normal(5, 48, seed=2)
    assert placed.shape == stack[place].shape == (48, 128)
    y, backward = jax.vjp(lambda x: linear(x, placed), x)
    expected_y, expected_backward = jax.vjp(lambda x: linear(x, stack[place]), x)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(backward(dy)[0], expected_backward(dy)[0])


def test_a_layers_placed_matrix_is_kept_as_a_place() -> None:
    """A scan keeps no codes for the backward pass, and takes none out of the stack ahead of a barrier."""
    stack = quantize(normal(3, 64, 64))

    def loss(x: jax.Array) -> jax.Array:
        body = lambda carry, place: (jnp.tanh(linear(carry, Placed(stack, place))), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(body, x, jnp.arange(3)[:, None])[0])

    program = list(equations(jax.make_jaxpr(jax.grad(loss))(normal(4, 64)).jaxpr))
    kept = [out.aval for equation in program if equation.primitive.name == "scan" for out in equation.outvars]
    assert kept
    assert not any(aval.dtype == jnp.uint8 for aval in kept)
    behind = {out for e in program if e.primitive.name == "optimization_barrier" for out in e.outvars}
    takes = [e for e in program if e.primitive.name == "dynamic_slice"]
    taken = [e for e in takes if e.outvars[0].aval.dtype == jnp.uint8]
    assert len(taken) == 4  # codes and scales, in both passes
    for equation in taken:
        assert depends_on(equation.invars[1], behind, program)


@pytest.mark.parametrize("placed", [False, True])
def test_several_matrices_are_dequantized_one_after_the_other(placed: bool) -> None:
    stack = quantize(normal(3, 48, 128))
    places = jnp.arange(3)[:, None]
    matrices = [Placed(stack, place) if placed else stack[place[0]] for place in places]
    x, dys = normal(5, 128, seed=1), [normal(5, 48, seed=seed) for seed in (2, 3, 4)]

    def both(x: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array]]:
        ys, backward = jax.vjp(lambda x: linears(x, matrices), x)
        return ys, backward(dys)

    ys, (dx,) = both(x)
    singly = [jax.vjp(lambda x, matrix=matrix: linear(x, matrix), x) for matrix in matrices]
    for y, (expected, _) in zip(ys, singly, strict=True):
        np.testing.assert_array_equal(y, expected)
    expected = sum(backward(dy)[0] for (_, backward), dy in zip(singly, dys, strict=True))
    np.testing.assert_allclose(dx, expected, rtol=1e-6, atol=1e-5)

    program = list(equations(jax.make_jaxpr(both)(x).jaxpr))
    products = [equation for equation in program if equation.primitive.name == "dot_general"]
    assert len(products) == 6
    for passed in (products[:3], products[3:]):
        for before, after in itertools.pairwise(passed):
            assert depends_on(after.invars[1], set(before.outvars), program)


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
@pytest.mark.parametrize("width", [128, 24])
def test_pieces_equal_the_whole(kind: Kind, double: bool, width: int) -> None:
    weight = normal(96, width)
    pieces = [np.asarray(weight[:32]), np.asarray(weight[32:40]), np.asarray(weight[40:])]
    assert same(quantize_pieces(iter(pieces), 96, kind, double), quantize(weight, kind, double))


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_file_gives_the_same_bits_back(tmp_path: Path, kind: Kind, double: bool) -> None:
    first, second = quantize(normal(2, 64, 64), kind, double), quantize(normal(4, 128, seed=1), kind, double)
    np.savez(tmp_path / "model.npz", **to_arrays(first, "layers.q"), **to_arrays(second, "layers.q_proj"))
    with np.load(tmp_path / "model.npz") as arrays:
        assert same(from_arrays(arrays, "layers.q"), first)
        assert same(from_arrays(arrays, "layers.q_proj"), second)
        with pytest.raises(KeyError, match="named 'layers"):
            from_arrays(arrays, "layers.k")
