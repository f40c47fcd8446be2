"""gelu(gate) · up, the nonlinearity of the feed-forward network, alone or with the adapters around it.

The arrays in the middle of a feed-forward network are the widest of a layer, and LoRA touches all three:
gate and up get a change each, and down's adapter reads the product with its own dropout. Written as separate
operations that is five more passes over them than the product itself needs. `adapted` computes all of it in
one pass forward and one backward; two rungs:

- "xla": the operations as they are defined. On every platform.
- "pallas": Triton through Pallas, for NVIDIA GPUs. See `gated_gelu_pallas.py`.
"""

import logging
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp

from keras_gemma_ft.ops import gated_gelu_pallas
from keras_gemma_ft.ops.dropout import drop
from keras_gemma_ft.ops.gated_gelu_pallas import Operands, gelu_and_share, gelu_slope

Implementation = Literal["auto", "xla", "pallas"]


def adapted(
    given: Operands, rate: float = 0.0, key: jax.Array | None = None, implementation: Implementation = "auto"
) -> tuple[jax.Array, jax.Array]:
    """product = gelu(gate + low_gate Bᵀ) · (up + low_up Bᵀ), and low = dropped(product) Aᵀ.

    Differentiable in all operands; nothing else is kept for the backward pass.

    Args:
        given: See `Operands`.
        rate: Share of the product dropped before A; the rest is not scaled (see `dropout.drop`).
        key: uint32 [2] of the dropout; None: nothing is dropped.
        implementation: A rung; "auto": "pallas" on GPU where it does not decline, else "xla".

    Returns:
        The product [..., F] and low [..., r], both in gate's dtype.

    Raises:
        NotImplementedError: The rung declines; the message says why.
    """
    if implementation == "pallas" or (implementation == "auto" and jax.default_backend() == "gpu"):
        try:
            gated_gelu_pallas.decline(given)
            return gated_gelu_pallas.adapted(given, rate, key)
        except NotImplementedError as reason:
            if implementation == "pallas":
                raise
            _log_declined(str(reason))
    return _xla(given, rate, key)


@cache
def _log_declined(reason: str) -> None:
    """Logs each reason once a process."""
    logging.getLogger(__name__).info("gated_gelu runs on xla; pallas declines: %s", reason)


def _xla(given: Operands, rate: float, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    dtype, last = given.gate.dtype, given.gate.ndim - 1
    times = partial(jax.lax.dot_general, dimension_numbers=(((last,), (1,)), ((), ())))
    gate = given.gate + times(given.low_gate, given.b_gate.astype(dtype))
    up = given.up + times(given.low_up, given.b_up.astype(dtype))
    product = gelu_product(gate, up)
    dropped = product if key is None or not rate else drop(product, rate, key)
    return product, times(dropped, given.a_down.astype(dtype))


@jax.custom_vjp
def gelu_product(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gelu(gate) · up with the tanh approximation, in float32 between; [...] in the arguments' dtype."""
    gelu, _ = gelu_and_share(gate.astype(jnp.float32))
    return (gelu * up.astype(jnp.float32)).astype(gate.dtype)


def _forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return gelu_product(gate, up), (gate, up)


def _backward(inputs: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Behind the barrier the sigmoid is computed again. Else it would be shared with the forward pass that
    # remat repeats, and stored for that, in float32: twice the size of the input it follows from.
    gate, up, d = jax.lax.optimization_barrier((*inputs, d))
    x, wide = gate.astype(jnp.float32), d.astype(jnp.float32)
    gelu, share = gelu_and_share(x)
    d_gate, d_up = wide * up.astype(jnp.float32) * gelu_slope(x, share), wide * gelu
    return d_gate.astype(gate.dtype), d_up.astype(up.dtype)


gelu_product.defvjp(_forward, _backward)
