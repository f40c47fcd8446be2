"""Gemma 4's mixture of experts: the router, and a feed-forward pass that runs the chosen experts only.

The formulas are those of transformers' modeling_gemma4.py (Gemma4TextRouter, Gemma4TextExperts).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from keras_gemma_ft.ops.grouped_matmul import Implementation, Weight, grouped_matmul


def route(
    x: jax.Array,
    scale: jax.Array,
    projection: jax.Array,
    per_expert_scale: jax.Array,
    top_k: int,
    epsilon: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's experts.

    RMS norm without a weight, times `scale` / sqrt(D), projected to one score for each expert; softmax over
    all experts in float32; the `top_k` largest, renormalized to sum 1, each times its expert's own scale.

    Args:
        x: Hidden states [T, D].
        scale: [D].
        projection: [E, D].
        per_expert_scale: [E].
        top_k: Experts a token.
        epsilon: Of the norm.

    Returns:
        expert_indices, int32 [T, top_k], the most probable first, and expert_weights, float32 [T, top_k].
    """
    x32 = x.astype(jnp.float32)
    normed = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
    scaled = normed * scale.astype(x.dtype) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
    scores = jnp.einsum("td,ed->te", scaled, projection.astype(x.dtype), preferred_element_type=jnp.float32)
    probabilities, indices = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), top_k)
    weights = probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)
    return indices, weights * per_expert_scale.astype(jnp.float32)[indices]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gate_up_a", "gate_up_b", "down_a", "down_b"],
    meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class ExpertLora:
    """Low-rank adapters of every expert: W + scale · B A. A pair that is None leaves its W as it is.

    Attributes:
        gate_up_a: [E, r, D]. gate_up_b: [E, 2F, r]. down_a: [E, r, F]. down_b: [E, D, r].
        scale: alpha / r.
    """

    gate_up_a: jax.Array | None
    gate_up_b: jax.Array | None
    down_a: jax.Array | None
    down_b: jax.Array | None
    scale: float


def expert_ffn(
    x: jax.Array,
    expert_indices: jax.Array,
    expert_weights: jax.Array,
    gate_up: Weight,
    down: Weight,
    lora: ExpertLora | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Σ over a token's chosen experts of weight · down(gelu_tanh(gate(x)) · up(x)).

    The T·k pairs of token and expert are sorted by expert, so that each expert multiplies one run of rows.
    The weight is applied before `down`, where rows are narrowest; being linear, `down` does not mind, and no
    [T·k, D] array has to be kept for the weights' gradient.

    Differentiable in x, expert_weights, the adapters, and in gate_up and down where they are arrays.

    Args:
        x: [T, D].
        expert_indices: int32 [T, k].
        expert_weights: [T, k].
        gate_up: [E, 2F, D], the gates' F rows first; an array or a quantized stack.
        down: [E, D, F], likewise.
        lora: Adapters of the experts.
        implementation: See `grouped_matmul`.

    Returns:
        [T, D] in x's dtype.
    """
    chosen = expert_indices.reshape(-1)
    order = jnp.argsort(
        chosen, stable=True
    )  # [T·k]: sorted row -> pair; pair p is choice p % k of token p // k
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    row = row.reshape(expert_indices.shape)  # [T, k]: the sorted row of each choice
    group_sizes = jnp.bincount(chosen, length=gate_up.shape[0]).astype(jnp.int32)
    product = partial(grouped_matmul, group_sizes=group_sizes, implementation=implementation)

    def projected(rows: jax.Array, weight: Weight, a: jax.Array | None, b: jax.Array | None) -> jax.Array:
        out = product(rows, weight)
        if lora is None or a is None or b is None:
            return out
        low = product(rows, a.astype(rows.dtype)) * jnp.asarray(lora.scale, rows.dtype)
        return out + product(low, b.astype(rows.dtype))

    rows = _dispatch(x, order, row)
    gate, up = jnp.split(projected(rows, gate_up, *_factors(lora, "gate_up")), 2, axis=-1)
    weights = expert_weights.reshape(-1).at[order].get(unique_indices=True, mode="promise_in_bounds")
    activated = _activated(gate, up, weights)
    return _combine(projected(activated, down, *_factors(lora, "down")), order, row)


@jax.checkpoint
def _activated(gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
    """weight · gelu_tanh(gate) · up of sorted rows [T·k, F], in float32 between.

    Under `checkpoint` the backward pass keeps gate and up in their own dtype, and none of the float32 steps.
    """
    wide = jax.nn.gelu(gate.astype(jnp.float32), approximate=True) * up.astype(jnp.float32)
    return (wide * weights.astype(jnp.float32)[:, None]).astype(gate.dtype)


def _factors(lora: ExpertLora | None, name: str) -> tuple[jax.Array | None, jax.Array | None]:
    return (None, None) if lora is None else (getattr(lora, f"{name}_a"), getattr(lora, f"{name}_b"))


# A token's rows are gathered in both directions: `_dispatch` and `_combine` are each other's transpose. Left
# to itself, the gradient of the first gather would be a scatter with colliding additions, slow and not
# deterministic.


@jax.custom_vjp
def _dispatch(x: jax.Array, order: jax.Array, row: jax.Array) -> jax.Array:
    """Tokens [T, D] to sorted rows [T·k, D]."""
    return x.at[order // row.shape[1]].get(mode="promise_in_bounds")


@jax.custom_vjp
def _combine(rows: jax.Array, order: jax.Array, row: jax.Array) -> jax.Array:
    """Sums each token's sorted rows [T·k, D] to [T, D], in float32."""
    taken = rows.at[row].get(mode="promise_in_bounds")
    return jnp.sum(taken, axis=1, dtype=jnp.float32).astype(rows.dtype)


_dispatch.defvjp(
    lambda x, order, row: (_dispatch(x, order, row), (order, row)),
    lambda residuals, d_rows: (_combine(d_rows, *residuals), None, None),
)
_combine.defvjp(
    lambda rows, order, row: (_combine(rows, order, row), (order, row)),
    lambda residuals, d_x: (_dispatch(d_x, *residuals), None, None),
)
