"""The chosen experts' pass with adapters against all experts computed densely: values and gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_gemma_ft.ops.moe import ExpertLora, expert_ffn
from keras_gemma_ft.ops.quantize import dequantize, quantize

TOKENS, EXPERTS, CHOSEN, WIDTH, HIDDEN, RANK = 24, 5, 2, 64, 32, 3
SCALE = 1.5


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, shape), jnp.float32)


def chosen() -> tuple[jax.Array, jax.Array]:
    """Each token's experts, the last of which nobody takes, and their weights."""
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(EXPERTS - 1)[:CHOSEN] for _ in range(TOKENS)])
    return jnp.asarray(indices, jnp.int32), jnp.asarray(rng.random((TOKENS, CHOSEN)), jnp.float32)


def factors() -> dict[str, jax.Array]:
    return {
        "gate_up_a": normal(EXPERTS, RANK, WIDTH, seed=1),
        "gate_up_b": normal(EXPERTS, 2 * HIDDEN, RANK, seed=2),
        "down_a": normal(EXPERTS, RANK, HIDDEN, seed=3),
        "down_b": normal(EXPERTS, WIDTH, RANK, seed=4),
    }


def dense(x: jax.Array, shares: jax.Array, lora: dict[str, jax.Array], gate_up: Any, down: Any) -> jax.Array:
    """Every expert with its adapter merged, on every token; those not chosen weigh nothing."""
    indices, _ = chosen()
    share_TxE = jnp.zeros((TOKENS, EXPERTS)).at[jnp.arange(TOKENS)[:, None], indices].add(shares)
    if lora:
        gate_up = gate_up + SCALE * lora["gate_up_b"] @ lora["gate_up_a"]
        down = down + SCALE * lora["down_b"] @ lora["down_a"]
    gate, up = jnp.split(jnp.einsum("td,efd->tef", x, gate_up), 2, axis=-1)
    return jnp.einsum("te,tef,edf->td", share_TxE, jax.nn.gelu(gate, approximate=True) * up, down)


@pytest.mark.parametrize("stored", ["float32", "nf4"])
def test_adapters_of_experts_have_the_values_and_gradients_of_merged_ones(stored):
    x, (indices, shares) = normal(TOKENS, WIDTH, seed=5), chosen()
    weights: Any = normal(EXPERTS, 2 * HIDDEN, WIDTH, seed=6), normal(EXPERTS, WIDTH, HIDDEN, seed=7)
    plain = weights
    if stored == "nf4":
        weights = tuple(quantize(weight) for weight in weights)
        plain = tuple(dequantize(weight, jnp.float32) for weight in weights)
    direction = normal(TOKENS, WIDTH, seed=8)

    def ours(x, shares, lora):
        out = expert_ffn(x, indices, shares, *weights, ExpertLora(**lora, scale=SCALE))
        return jnp.sum(out * direction), out

    def theirs(x, shares, lora):
        out = dense(x, shares, lora, *plain)
        return jnp.sum(out * direction), out

    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(x, shares, factors()) for f in (ours, theirs)
    )
    # The sum itself is not compared: its terms are, and they cancel.
    (_, found_out), found_gradients = found
    (_, expected_out), expected_gradients = expected
    same_leaves = dict(jax.tree_util.tree_leaves_with_path((found_out, found_gradients)))
    for path, value in jax.tree_util.tree_leaves_with_path((expected_out, expected_gradients)):
        same = same_leaves[path]
        np.testing.assert_allclose(same, value, atol=1e-5 * float(jnp.abs(value).max()), err_msg=str(path))
    lora_b = found_gradients[2]["gate_up_b"]
    # An expert that no token took learns nothing, and each of the others does.
    assert [bool(jnp.any(gradient)) for gradient in lora_b] == [True] * (EXPERTS - 1) + [False]


@pytest.mark.parametrize("without", ["gate_up", "down"])
def test_one_of_the_two_matrices_may_go_without(without):
    x, (indices, shares) = normal(TOKENS, WIDTH, seed=5), chosen()
    weights = normal(EXPERTS, 2 * HIDDEN, WIDTH, seed=6), normal(EXPERTS, WIDTH, HIDDEN, seed=7)
    lora = ExpertLora(**factors(), scale=SCALE)
    none = dataclasses.replace(lora, **{f"{without}_a": None, f"{without}_b": None})
    zero = {**factors(), f"{without}_b": jnp.zeros_like(factors()[f"{without}_b"])}
    found = expert_ffn(x, indices, shares, *weights, none)
    np.testing.assert_allclose(found, dense(x, shares, zero, *weights), atol=1e-5)


def test_the_backward_pass_keeps_nothing_in_float32_but_the_choice():
    """With bfloat16 rows; GELU in float32 would be kept in twice the size of what it follows from."""
    x, (indices, shares) = normal(TOKENS, WIDTH, seed=5).astype(jnp.bfloat16), chosen()
    weights = [
        normal(EXPERTS, 2 * HIDDEN, WIDTH, seed=6).astype(jnp.bfloat16),
        normal(EXPERTS, WIDTH, HIDDEN, seed=7).astype(jnp.bfloat16),
    ]
    _, pullback = jax.vjp(lambda x, shares: expert_ffn(x, indices, shares, *weights), x, shares)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32]
    assert max((leaf.size for leaf in kept), default=0) <= TOKENS * CHOSEN
