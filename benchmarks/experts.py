"""Experts and NF4 on one GPU, at Gemma 4 26B-A4B's shapes: parity, then speed, as JSON lines.

    python benchmarks/experts.py --seconds 240

Needs JAX with a GPU, nothing else. `ceiling` is a plain matrix product in the same run; every TFLOP/s counts
useful work only (2·M·K·N), so tiles wasted on ragged group ends count against the kernel.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from keras_gemma_ft.ops import moe, nf4
from keras_gemma_ft.ops import pallas_grouped_matmul as kernels
from keras_gemma_ft.ops.grouped_matmul import RUNGS
from keras_gemma_ft.ops.quantize import QuantizedTensor, dequantize, quantize

EXPERTS, TOP_K, TOKENS, HIDDEN, WIDTH = 128, 8, 8192, 2816, 704
ROWS = TOKENS * TOP_K


def report(what: str, **figures: Any) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"what": what, **rounded}), flush=True)


def seconds(function: Callable[..., Any], *arguments: Any, at_least: float = 0.15) -> float:
    """Seconds a call, of many in flight; the first call compiles and is left out."""
    jax.block_until_ready(function(*arguments))
    calls = 3
    while True:
        begin = time.perf_counter()
        out = None
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        spent = time.perf_counter() - begin
        if spent > at_least or calls >= 10_000:
            return spent / calls
        calls *= 4


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.jit(lambda key: (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype))(
        jax.random.key(seed)
    )


def relative_error(value: jax.Array, reference: jax.Array) -> float:
    difference = jax.jit(
        lambda a, b: (
            jnp.linalg.norm((a.astype(jnp.float32) - b.astype(jnp.float32)).ravel())
            / jnp.linalg.norm(b.astype(jnp.float32).ravel())
        )
    )
    return float(difference(value, reference))


def guarded(name: str, chapter: Callable[[], None]) -> None:
    """Runs a chapter; a failure is one line, and the next chapter still runs."""
    begin = time.perf_counter()
    try:
        chapter()
    except Exception as error:
        report("failed", chapter=name, error=f"{type(error).__name__}: {error}"[:400])
    report("chapter", chapter=name, seconds=time.perf_counter() - begin)


# --- The ceiling --------------------------------------------------------------------------------------------


def ceiling() -> None:
    for m, k, n in ((8192, 2560, 20480), (8192, 8192, 8192), (ROWS, HIDDEN, 2 * WIDTH)):
        product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
        spent = seconds(product, normal(1, (m, k)), normal(2, (n, k)))
        report("ceiling", shape=[m, k, n], tflops=2e-12 * m * k * n / spent)
    batched = jax.jit(lambda x, w: jnp.einsum("emk,enk->emn", x, w))
    x, w = normal(1, (EXPERTS, ROWS // EXPERTS, HIDDEN)), normal(2, (EXPERTS, 2 * WIDTH, HIDDEN))
    report("ceiling", shape="equal groups", tflops=2e-12 * ROWS * HIDDEN * 2 * WIDTH / seconds(batched, x, w))


# --- The grouped product ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """One grouped product of a layer: `k` in, `n` out, the experts' matrices stored [n, k], transposed [k,
    n]."""

    name: str
    k: int
    n: int
    transposed: bool

    def operands(self) -> tuple[jax.Array, jax.Array]:
        shape = (EXPERTS, self.k, self.n) if self.transposed else (EXPERTS, self.n, self.k)
        return normal(3, (ROWS, self.k)), normal(4, shape, 0.02)

    def product(self, tiling: kernels.Tiling | None) -> Callable[..., jax.Array]:
        return jax.jit(partial(kernels.product, transposed=self.transposed, tiling=tiling))


PROBLEMS = (
    Problem("gate_up", HIDDEN, 2 * WIDTH, False),
    Problem("gate_up dlhs", 2 * WIDTH, HIDDEN, True),
    Problem("down", WIDTH, HIDDEN, False),
    Problem("down dlhs", HIDDEN, WIDTH, True),
)


def routed_sizes(concentration: float) -> jax.Array:
    """Rows of each expert under a random router; small concentrations give uneven and empty groups."""
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.full(EXPERTS, concentration))
    return jnp.asarray(generator.multinomial(ROWS, shares), jnp.int32)


def parity() -> None:
    sizes = routed_sizes(0.2)
    loop = jax.jit(RUNGS["tiled"].product, static_argnums=3)
    for problem in PROBLEMS:
        x, w = problem.operands()
        expected = loop(x, w, sizes, problem.transposed)
        error = relative_error(problem.product(None)(x, w, sizes), expected)
        report("parity", product=problem.name, empty_groups=int((sizes == 0).sum()), largest=int(sizes.max()),
               relative_error=error, ok=error < 3e-3)  # fmt: skip
    x, dy = normal(5, (ROWS, HIDDEN)), normal(6, (ROWS, 16))
    for left, right, name in ((x, dy, "dA transposed"), (dy, x, "dA")):
        expected = jax.jit(RUNGS["tiled"].weight_gradient)(left, right, sizes)
        gradient = jax.jit(kernels.weight_gradient)
        error = relative_error(gradient(left, right, sizes), expected)
        report("parity", product=f"weight gradient, {name}", relative_error=error, ok=error < 3e-3,
               milliseconds=1e3 * seconds(gradient, left, right, sizes))  # fmt: skip


def tilings() -> Iterator[kernels.Tiling]:
    """The likeliest first, since the time may run out."""
    shapes = (
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 256, 64, 8, 4), (64, 256, 64, 4, 4),
        (256, 128, 64, 8, 3), (64, 128, 64, 4, 4), (128, 256, 32, 8, 4), (128, 128, 128, 8, 2),
        (64, 128, 128, 4, 3),
    )  # fmt: skip
    for (rows, columns, depth, warps, stages), band in itertools.product(shapes[:3], (1, 4)):
        yield kernels.Tiling(rows, columns, depth, band, warps, stages)
    for rows, columns, depth, warps, stages in shapes[3:]:
        yield kernels.Tiling(rows, columns, depth, 1, warps, stages)


def sweep(limit: float) -> None:
    begin = time.perf_counter()
    even, uneven = routed_sizes(1000.0), routed_sizes(1.0)
    for number, problem in enumerate(PROBLEMS):
        x, w = problem.operands()
        flops = 2e-12 * ROWS * problem.k * problem.n
        found: list[tuple[float, kernels.Tiling]] = []
        failed: dict[str, str] = {}
        for tiling in tilings():
            if time.perf_counter() - begin > limit * (number + 1) / len(PROBLEMS):
                break
            try:
                found.append((flops / seconds(problem.product(tiling), x, w, even, at_least=0.03), tiling))
            except Exception as error:
                failed[str(dataclasses.astuple(tiling))] = f"{type(error).__name__}: {error}"[:90]
        found.sort(key=lambda pair: -pair[0])
        for tflops, tiling in found[:5]:
            report("sweep", product=problem.name, tiling=dataclasses.astuple(tiling), tflops=tflops)
        report("sweep", product=problem.name, tried=len(found), failed=failed,
               fields="rows columns depth band warps stages")  # fmt: skip
        if found:
            spent = seconds(problem.product(found[0][1]), x, w, uneven)
            report("sweep", product=problem.name, groups="uneven", tflops=flops / spent)


def library() -> None:
    """JAX's own example of a grouped product for Hopper (Mosaic), for comparison."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    sizes = routed_sizes(1000.0)
    for problem in PROBLEMS[:2]:
        x, w = problem.operands()
        expected = problem.product(None)(x, w, sizes)
        flops = 2e-12 * ROWS * problem.k * problem.n
        for block_m, block_n, steps, band in (
            (128, 128, 4, 1),
            (64, 128, 4, 1),
            (128, 128, 5, 11),
            (128, 256, 3, 1),
        ):
            settings = {"block_m": block_m, "block_n": block_n, "block_k": 64, "max_concurrent_steps": steps}
            try:
                product = jax.jit(
                    partial(
                        ragged_dot_mgpu.ragged_dot,
                        transpose_rhs=not problem.transposed,
                        grid_block_n=band,
                        **settings,
                    )
                )
                error = relative_error(product(x, w, group_sizes=sizes), expected)
                spent = seconds(lambda: product(x, w, group_sizes=sizes))  # noqa: B023
                report(
                    "mosaic", product=problem.name, **settings, band=band, tflops=flops / spent, error=error
                )
            except Exception as problem_with_it:
                report(
                    "mosaic", product=problem.name, **settings, band=band, failed=repr(problem_with_it)[:200]
                )


def layer() -> None:
    """One expert layer, forward alone and with the backward pass to x, in bf16 and with NF4 experts."""
    x = normal(7, (TOKENS, HIDDEN))
    indices, weights = jax.jit(partial(moe.route, top_k=TOP_K))(
        x, jnp.ones(HIDDEN), normal(8, (EXPERTS, HIDDEN), 0.5, jnp.float32), jnp.ones(EXPERTS)
    )
    gate_up = normal(9, (EXPERTS, 2 * WIDTH, HIDDEN), 0.02)
    down = normal(10, (EXPERTS, HIDDEN, WIDTH), 0.02)
    flops = 2e-12 * ROWS * 3 * WIDTH * HIDDEN
    forward = jax.jit(moe.expert_ffn)

    def loss(x: jax.Array, *rest: Any) -> jax.Array:
        return jnp.sum(jax.checkpoint(moe.expert_ffn)(x, *rest).astype(jnp.float32) ** 2)

    both = jax.jit(jax.grad(loss))
    quantized = jax.jit(quantize)(gate_up), jax.jit(quantize)(down)
    for name, experts in (("bf16", (gate_up, down)), ("nf4", quantized)):
        one = seconds(forward, x, indices, weights, *experts)
        two = seconds(both, x, indices, weights, *experts)
        report("layer", experts=name, forward_ms=1e3 * one, forward_tflops=flops / one,
               remat_and_backward_ms=1e3 * two, remat_and_backward_tflops=3 * flops / two)  # fmt: skip


# --- NF4 ----------------------------------------------------------------------------------------------------


def absmax_of(tensor: QuantizedTensor) -> jax.Array:
    return nf4.dequantize_absmax(tensor.absmax, tensor.nested, tensor.offset)  # type: ignore[arg-type]


def scales_apart(tensor: QuantizedTensor) -> jax.Array:
    """The scales as their own kernel, then one fusion for the weights."""
    absmax = jax.lax.optimization_barrier(absmax_of(tensor))
    return nf4.dequantize_blocks(tensor.codes, absmax, jnp.bfloat16)


def select_tree(tensor: QuantizedTensor) -> jax.Array:
    """Fifteen selects in place of the table of levels; scales apart."""
    absmax = jax.lax.optimization_barrier(absmax_of(tensor))
    *stack, rows, half = tensor.codes.shape
    nibble = (tensor.codes[..., None] >> jnp.array([4, 0], jnp.uint8)) & 15
    values: list[Any] = [jnp.float32(level) for level in nf4.LEVELS]
    for bit in range(4):
        one = (nibble & (1 << bit)) != 0
        values = [jnp.where(one, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    scaled = values[0].reshape(*stack, -1, nf4.BLOCK) * absmax[..., None]
    return scaled.astype(jnp.bfloat16).reshape(*stack, rows, 2 * half)


def pairs_table(tensor: QuantizedTensor) -> jax.Array:
    """One look-up of both levels of a byte, [256, 2]; scales apart."""
    absmax = jax.lax.optimization_barrier(absmax_of(tensor))
    *stack, rows, half = tensor.codes.shape
    table = np.stack([nf4.LEVELS.repeat(16), np.tile(nf4.LEVELS, 16)], axis=-1)
    values = jnp.asarray(table)[tensor.codes].reshape(*stack, -1, nf4.BLOCK) * absmax[..., None]
    return values.astype(jnp.bfloat16).reshape(*stack, rows, 2 * half)


def pallas_kernel(tensor: QuantizedTensor, block: int = 2048, warps: int = 4) -> jax.Array:
    """A Triton kernel: each program unpacks `block` bytes; levels by a look-up; scales apart."""
    absmax = absmax_of(tensor).reshape(-1)
    codes = tensor.codes.reshape(-1)

    def kernel(levels_ref: Any, codes_ref: Any, absmax_ref: Any, out_ref: Any) -> None:
        first = pl.program_id(0) * 2 * block
        i = first + jnp.arange(2 * block)
        byte = plgpu.load(codes_ref.at[i // 2])
        nibble = (byte.astype(jnp.int32) >> (4 - 4 * (i % 2))) & 15
        value = plgpu.load(levels_ref.at[nibble]) * plgpu.load(absmax_ref.at[i // nf4.BLOCK])
        out_ref[pl.ds(first, 2 * block)] = value.astype(out_ref.dtype)

    out = pl.pallas_call(
        kernel,
        grid=(codes.size // block,),
        out_shape=jax.ShapeDtypeStruct((2 * codes.size,), jnp.bfloat16),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        name="nf4_dequantize",
    )(jnp.asarray(nf4.LEVELS), codes, absmax)
    return out.reshape(tensor.shape)


VARIANTS: dict[str, Callable[[QuantizedTensor], jax.Array]] = {
    "ours": partial(dequantize, dtype=jnp.bfloat16),
    "scales apart": scales_apart,
    "select tree": select_tree,
    "table of pairs": pairs_table,
    "pallas 2048": pallas_kernel,
    "pallas 512": partial(pallas_kernel, block=512),
    "pallas 2048, 8 warps": partial(pallas_kernel, warps=8),
}


def nf4_speed() -> None:
    for shape in ((20480, 2560), (EXPERTS, 2 * WIDTH, HIDDEN)):
        weight = normal(11, shape, 0.02)
        quantizer = jax.jit(quantize)
        tensor = quantizer(weight)
        expected = jax.jit(VARIANTS["ours"])(tensor)
        size = float(weight.size)
        report(
            "nf4",
            shape=shape,
            variant="quantize",
            gigabytes_per_second=2e-9 * size / seconds(quantizer, weight),
        )
        for name, variant in VARIANTS.items():
            try:
                function = jax.jit(variant)
                same = bool(jnp.array_equal(function(tensor), expected))
                spent = seconds(function, tensor)
                report("nf4", shape=shape, variant=name, milliseconds=1e3 * spent, same_bits=same,
                       gigabytes_per_second=1e-9 * size * (0.5 + 1 / 64 + 2) / spent)  # fmt: skip
            except Exception as error:
                report("nf4", shape=shape, variant=name, error=f"{type(error).__name__}: {error}"[:200])


def nf4_bits() -> None:
    """Quantized on the GPU and on the host: the same bits."""
    weight = normal(12, (2048, 2560), 0.02)
    here = jax.jit(lambda w: (quantize(w), dequantize(quantize(w), jnp.float32)))(weight)
    with jax.default_device(jax.devices("cpu")[0]):
        there = jax.jit(lambda w: (quantize(w), dequantize(quantize(w), jnp.float32)))(np.asarray(weight))
    names = ("codes", "absmax", "nested", "offset", "values")
    pairs = zip(names, jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
    report("nf4 bits", different={name: int((np.asarray(a) != np.asarray(b)).sum()) for name, a, b in pairs})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240, help="limit of the sweep over tilings")
    limit = parser.parse_args().seconds
    device = jax.devices()[0]
    report("device", kind=device.device_kind, platform=device.platform, jax=jax.__version__)
    guarded("ceiling", ceiling)
    guarded("nf4 bits", nf4_bits)
    guarded("parity", parity)
    guarded("layer", layer)
    guarded("nf4", nf4_speed)
    guarded("sweep", partial(sweep, limit))
    guarded("library", library)


if __name__ == "__main__":
    main()
