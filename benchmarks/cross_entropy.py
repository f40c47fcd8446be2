"""The vocabulary loss with its gradient at Gemma 4's shapes, on whatever device there is, as JSON lines.

    python benchmarks/cross_entropy.py                 # 8,192 tokens, the widths of E2B, E4B and 31B
    python benchmarks/cross_entropy.py --sweep         # chunks and blocks of other sizes, at E4B's width
    python benchmarks/cross_entropy.py --small         # sizes for a CPU

Needs JAX, nothing else. TFLOP/s count useful work: 4·V·D for each supervised token, the two products of a
frozen table. `ceiling` is those two products alone in the same run, all tokens at once and one block of the
table.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from keras_gemma_ft.ops.cross_entropy import BLOCK_ROWS, cross_entropy_sum
from keras_gemma_ft.ops.quantize import QuantizedTensor, quantize

SOFT_CAP = 30.0
SHARES = (1.0, 0.5, 0.1)
SWEEP = [
    (512, 262_144), (1024, 262_144), (1024, 8192), (1024, 16_384), (1024, 32_768), (2048, 8192),
    (2048, 16_384), (2048, 32_768), (4096, 4096), (4096, 8192), (4096, 16_384), (8192, 2048), (8192, 4096),
    (8192, 8192),
]  # fmt: skip


def report(what: str, **figures: Any) -> None:
    rounded = {
        name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()
    }
    print(json.dumps({"what": what, **rounded}), flush=True)


def seconds(function: Callable[..., Any], *arguments: Any, at_least: float = 0.3) -> float:
    """Seconds a call, of several in flight; the first call is left out."""
    jax.block_until_ready(function(*arguments))
    calls = 1
    while True:
        begin = time.perf_counter()
        for _ in range(calls):  # of whose results the last alone is kept
            out = function(*arguments)
        jax.block_until_ready(out)
        spent = time.perf_counter() - begin
        if spent > at_least:
            return spent / calls
        calls *= 3


@partial(jax.jit, static_argnums=(1, 2))
def normal(seed: int, shape: tuple[int, ...], scale: float) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(jnp.bfloat16)


def measure(
    hidden: jax.Array, table: jax.Array | QuantizedTensor, share: float, train: bool = False, **cut: int
) -> None:
    """One line: time, speed and temporaries of loss and gradient with a share of the tokens supervised."""
    (tokens, width), vocabulary = hidden.shape, table.shape[0]
    targets = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary, jnp.int32)
    mask = jax.random.permutation(jax.random.key(3), tokens) < round(share * tokens)

    def loss(hidden: jax.Array, table: Any, targets: jax.Array, mask: jax.Array) -> jax.Array:
        total, count = cross_entropy_sum(
            hidden, table, targets, mask, soft_cap=SOFT_CAP, train_embedding=train, **cut
        )
        return total / count

    begin = time.perf_counter()
    gradient = jax.value_and_grad(loss, (0, 1) if train else 0)
    step = jax.jit(gradient).lower(hidden, table, targets, mask).compile()
    compiled = time.perf_counter() - begin
    spent = seconds(step, hidden, table, targets, mask)
    report(
        "loss and gradient",
        table=table.kind if isinstance(table, QuantizedTensor) else str(table.dtype),
        tokens=tokens, width=width, vocabulary=vocabulary, supervised=share, train_embedding=train, **cut,
        ms=1e3 * spent,
        tflops=(2 if train else 1) * 4e-12 * share * tokens * vocabulary * width / spent,
        temporary_mib=step.memory_analysis().temp_size_in_bytes / 2**20,
        compile_s=compiled,
    )  # fmt: skip


def ceiling(hidden: jax.Array, table: jax.Array) -> None:
    """The two products of a block, their operands given."""
    block = table[:BLOCK_ROWS]
    weights = normal(4, (hidden.shape[0], block.shape[0]), 1.0)
    dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    logits = jax.jit(lambda x, rows: dot(x, rows, (((1,), (1,)), ((), ()))))
    pull = jax.jit(lambda weights, rows: dot(weights, rows, (((1,), (0,)), ((), ()))))
    spent = seconds(logits, hidden, block) + seconds(pull, weights, block)
    report(
        "ceiling", width=hidden.shape[1],
        tflops=4e-12 * hidden.shape[0] * block.size / spent,
        ms_of_whole_table=1e3 * spent * table.shape[0] / block.shape[0],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="512 tokens in chunks of 64, a vocabulary of 4096"
    )
    parser.add_argument("--sweep", action="store_true", help="other sizes of chunks and blocks")
    arguments = parser.parse_args()
    tokens, vocabulary, widths = (
        (512, 4096, (256,)) if arguments.small else (8192, 262_144, (2560, 1536, 5376))
    )
    cut = {"chunk_tokens": 64} if arguments.small else {}
    report("device", kind=jax.devices()[0].device_kind, jax=jax.__version__)
    for width in widths[: 1 if arguments.sweep else None]:
        hidden, table = normal(0, (tokens, width), 1.0), normal(1, (vocabulary, width), width**-0.5)
        ceiling(hidden, table)
        if arguments.sweep:
            for stored in (table, quantize(table, "int8")):
                for chunk, block in SWEEP:
                    if isinstance(stored, jax.Array) or block < vocabulary:
                        measure(hidden, stored, 1.0, chunk_tokens=chunk, block_rows=block)
            continue
        for share in SHARES:
            measure(hidden, table, share, **cut)
        if width == widths[0]:
            for kind in ("nf4", "int8"):
                measure(hidden, quantize(table, kind), 1.0, **cut)
            measure(hidden, table, 1.0, train=True, **cut)


if __name__ == "__main__":
    main()
