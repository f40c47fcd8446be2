"""The matrix products of a layer: base weights, quantized or not, with their adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from keras_gemma_ft.ops import gated_gelu, quantize
from keras_gemma_ft.ops.dropout import drop, fold
from keras_gemma_ft.ops.gated_gelu import Operands, gelu_product
from keras_gemma_ft.ops.quantize import Quantized

Matrix: TypeAlias = jax.Array | Quantized
Adapters: TypeAlias = Mapping[str, Mapping[str, jax.Array]]
"""`own/local/q_proj` → `lora_a` [groups, locals, rank, in], `lora_b` [groups, locals, out, rank]; of one
layer: `q_proj` → the same without the leading axes."""


@dataclass(frozen=True)
class Projections:
    """The products of a layer, adapters included; what they give can be kept for the backward pass by role.

    Attributes:
        weights: By role.
        adapters: Of the layer.
        scale: alpha / rank.
        dropout: Share of an adapter's inputs dropped where there is a key.
        dropout_key: uint32 [2], of the layer.
    """

    weights: Mapping[str, Matrix]
    adapters: Adapters
    scale: float
    dropout: float
    dropout_key: jax.Array | None

    def __call__(self, roles: tuple[str, ...], x: jax.Array, place: int) -> list[jax.Array]:
        """x [..., in] times the matrices of `roles`, which share one dropped-out input.

        Args:
            roles: Which matrices.
            x: Their input.
            place: Number of the input within the layer; each has a dropout mask of its own.
        """
        adapted = [role for role in roles if role in self.adapters]
        factors: Adapters = {}
        if adapted:
            x, factors = _gradients_at_once(x, {role: self.adapters[role] for role in adapted})
        outputs = dict(zip(roles, linears(x, [self.weights[role] for role in roles]), strict=True))
        if adapted:
            for role, low in zip(adapted, self._low(adapted, factors, x, place), strict=True):
                outputs[role] = outputs[role] + linear(low, factors[role]["lora_b"].astype(x.dtype))
        return [checkpoint_name(outputs[role], role) for role in roles]

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """down(gelu(gate(x)) · up(x)); in few passes if all three matrices have adapters."""
        roles = ("gate_proj", "up_proj")
        if not self.adapters.keys() >= {*roles, "down_proj"}:
            return self(("down_proj",), gelu_product(*self(roles, x, 2)), 3)[0]
        x, factors = _gradients_at_once(x, {role: self.adapters[role] for role in (*roles, "down_proj")})
        products = linears(x, [self.weights[role] for role in roles])
        gate, up = (checkpoint_name(product, role) for product, role in zip(products, roles, strict=True))
        b_gate, b_up, b_down = (factors[role]["lora_b"] for role in (*roles, "down_proj"))
        low_gate, low_up = self._low(roles, factors, x, 2)
        a_down = factors["down_proj"]["lora_a"]
        operands = Operands(gate, up, low_gate, low_up, b_gate, b_up, a_down)
        product, low = gated_gelu.adapted(operands, *self._dropout(3))
        change = linear(self._scaled(low), b_down.astype(x.dtype))
        return checkpoint_name(linear(product, self.weights["down_proj"]) + change, "down_proj")

    def _low(self, roles: Sequence[str], factors: Adapters, x: jax.Array, place: int) -> list[jax.Array]:
        """scale · A x of each role, in x's dtype; the factors are float32 and rounded to it here.

        All A stand in one product, which reads x once.
        """
        rate, key = self._dropout(place)
        if key is not None:
            x = drop(x, rate, key)
        a = jnp.concatenate([factors[role]["lora_a"] for role in roles])
        return jnp.split(self._scaled(linear(x, a.astype(x.dtype))), len(roles), axis=-1)

    def _dropout(self, place: int) -> tuple[float, jax.Array | None]:
        """The rate and the key of an input's dropout; no key: nothing is dropped."""
        key = self.dropout_key
        return self.dropout, None if key is None or not self.dropout else fold(key, place)

    def _scaled(self, low: jax.Array) -> jax.Array:
        """An adapter's scale, dropout's included, where there is least to multiply."""
        scale = self.scale if self.dropout_key is None else self.scale / (1 - self.dropout)
        return checkpoint_name((low.astype(jnp.float32) * scale).astype(low.dtype), "low")


@jax.custom_vjp
def _gradients_at_once(x: jax.Array, factors: Adapters) -> tuple[jax.Array, Adapters]:
    """An input and the adapters that read it, as they are; in the backward pass, their gradients together.

    XLA would put the factors' gradients off to the end of the layer, or for a global one until the group's
    local ones are through, and keep until then what they are computed from: half of what a layer works with.
    """
    return x, factors


_gradients_at_once.defvjp(
    lambda x, factors: ((x, factors), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)


def linear(x: jax.Array, weight: Matrix) -> jax.Array:
    """x [..., in] times a matrix [out, in], transposed: [..., out] in x's dtype."""
    return linears(x, [weight])[0]


def linears(x: jax.Array, weights: Sequence[Matrix]) -> list[jax.Array]:
    """x [..., in] times each of some matrices [out, in], all of them quantized or none."""
    quantized = [weight for weight in weights if isinstance(weight, Quantized)]
    if quantized:
        return quantize.linears(x, quantized)
    arrays = [jnp.asarray(weight, x.dtype) for weight in weights]
    return [jax.lax.dot_general(x, array, (((x.ndim - 1,), (1,)), ((), ()))) for array in arrays]
