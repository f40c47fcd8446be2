"""The feed-forward network's nonlinearity with its adapters on one GPU: parity and speed, as JSON lines.

    python benchmarks/gated_gelu.py            # 8,192 tokens, the widths of E2B, E4B and 31B
    python benchmarks/gated_gelu.py --small    # sizes for a CPU; only the XLA rung there

Parity: the largest distance of a result or gradient from the XLA rung in float32, relative in the L2 norm.
bfloat16 results are rounded by 2^-9 = 2e-3 each, and so are the operands of the products they come from.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cross_entropy import normal, seconds

from keras_gemma_ft.ops.gated_gelu import Operands, adapted

RANK, RATE = 16, 0.05
TOLERANCE = 1e-2


def arguments(tokens: int, width: int) -> tuple[Operands, tuple[jax.Array, jax.Array]]:
    """What `adapted` is given, and what its results' gradients are."""
    wide, low = (tokens, width), (tokens, RANK)
    arrays = [normal(seed, shape, 1.0) for seed, shape in enumerate((wide, wide, low, low))]
    factors = [normal(seed, shape, 0.1) for seed, shape in ((4, (width, RANK)), (5, (width, RANK)))]
    factors.append(normal(6, (RANK, width), width**-0.5))
    arrays += [factor.astype(jnp.float32) for factor in factors]
    return Operands(*arrays), (normal(7, wide, 1.0), normal(8, low, 1.0))


@partial(jax.jit, static_argnums=0)
def forward(rung: str, key: jax.Array, given: Operands) -> Any:
    return adapted(given, RATE, key, rung)


@partial(jax.jit, static_argnums=0)
def backward(rung: str, key: jax.Array, given: Operands, gradients: Any) -> Any:
    """The gradients alone: nothing of the forward pass is needed for them but its arguments."""
    return jax.vjp(lambda given: adapted(given, RATE, key, rung), given)[1](gradients)


def distances(found: Any, expected: Any) -> list[float]:
    wide = lambda tree: [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    pairs = zip(wide(found), wide(expected), strict=True)
    return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    small = parser.parse_args().small
    key = jnp.array([3, 9], jnp.uint32)
    rungs = ("pallas", "xla") if jax.default_backend() == "gpu" else ("xla",)
    failed = False
    for tokens, width in [(256, 512)] if small else [(8192, 6144), (8192, 10240), (8192, 21504)]:
        given, gradients = arguments(tokens, width)
        as_float32 = partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float32))
        exact = (
            forward("xla", key, as_float32(given)),
            backward("xla", key, *as_float32((given, gradients))),
        )
        for rung in rungs:
            found = forward(rung, key, given), backward(rung, key, given, gradients)
            distance = max(distances(found, exact))
            failed |= not distance < TOLERANCE
            figures = {
                "distance": round(distance, 5),
                "forward_us": round(1e6 * seconds(forward, rung, key, given)),
                "backward_us": round(1e6 * seconds(backward, rung, key, given, gradients)),
            }
            print(json.dumps({"rung": rung, "tokens": tokens, "width": width, **figures}), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
