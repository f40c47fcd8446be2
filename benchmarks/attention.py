"""Attention on one GPU at Gemma 4's shapes: parity, speed, memory and a sweep of tilings, as JSON lines.

    python benchmarks/attention.py --seconds 540

Needs JAX with a GPU, nothing else (`--tiny` tries the script on a CPU: small shapes, interpreted kernels).
Rows are packed with examples of odd lengths and end in padding. TFLOP/s count what the mask lets through and
nothing else: 4·D operations a visible pair and head forward, 14·D forward and backward.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from keras_gemma_ft.ops import attention as ladder
from keras_gemma_ft.ops import attention_pallas as kernels
from keras_gemma_ft.ops.attention_mask import may_attend
from keras_gemma_ft.ops.attention_pallas import Tiling, Tuning


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    key_heads: int
    dim: int
    window: int | None


SHAPES = {
    "E4B local": Shape(4, 2048, 8, 2, 256, 512),
    "E4B global": Shape(4, 2048, 8, 2, 512, None),
    "31B local": Shape(4, 2048, 32, 16, 256, 1024),
    "31B global": Shape(4, 2048, 32, 4, 512, None),
    "E2B local": Shape(4, 2048, 8, 1, 256, 512),
    "E2B global": Shape(4, 2048, 8, 1, 512, None),
    "26B-A4B local": Shape(4, 2048, 16, 8, 256, 1024),
    "26B-A4B global": Shape(4, 2048, 16, 2, 512, None),
}
# bfloat16 operands have a relative rounding error of 2^-9 = 2e-3, and so have weights and their gradients
# before the second product: a few of these add up in quadrature. A wrong block or mask changes whole rows by
# their own size.
TOLERANCE, ROW_TOLERANCE = 1e-2, 1e-1


def report(what: str, **figures: Any) -> None:
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"what": what, **rounded}), flush=True)


class Clock:
    """The time that is left, and a guard that turns a failure into one line."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def over(self) -> bool:
        return time.perf_counter() > self.end

    def run(self, function: Callable[[], None], **labels: Any) -> None:
        if self.over():
            report("skipped", **labels)
            return
        try:
            function()
        except Exception as error:
            report("failed", **labels, error=f"{type(error).__name__}: {error}"[:300])


# --- Inputs -------------------------------------------------------------------------------------------------


def packed_segments(rng: np.random.Generator, batch: int, length: int, examples: int = 6) -> jax.Array:
    """int32 [batch, length]: examples of odd lengths one after the other, then padding; no two rows alike."""
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, length, 2), examples, replace=False))
        for number, (start, end) in enumerate(itertools.pairwise([0, *cuts]), 1):
            row[start:end] = number
    return jnp.asarray(segments)


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    segment_ids: jax.Array


def inputs(shape: Shape, segments: jax.Array | None = None) -> Inputs:
    """Random inputs whose logits have a standard deviation of 2: weights neither flat nor one-hot."""
    keys = jax.random.split(jax.random.key(0), 4)
    wide = (shape.batch, shape.length, shape.heads, shape.dim)
    narrow = (shape.batch, shape.length, shape.key_heads, shape.dim)
    draw = jax.jit(
        lambda key, dims, scale: (scale * jax.random.normal(key, dims)).astype(jnp.bfloat16),
        static_argnums=1,
    )
    if segments is None:
        segments = packed_segments(np.random.default_rng(0), shape.batch, shape.length)
    return Inputs(
        draw(keys[0], wide, 2 * shape.dim**-0.5),
        draw(keys[1], narrow, 1.0),
        draw(keys[2], narrow, 1.0),
        draw(keys[3], wide, 1.0),
        segments,
    )


def visible_pairs(segment_ids: jax.Array, window: int | None) -> int:
    index = jnp.arange(segment_ids.shape[1])

    def count(segments: jax.Array) -> jax.Array:
        visible = may_attend(index[:, None], index[None, :], segments[:, None], segments[None, :], window)
        return visible.sum()

    return sum(int(jax.jit(count)(row)) for row in segment_ids)


# --- Candidates ---------------------------------------------------------------------------------------------


def packed_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array,
    window: int | None,
    most: int = 8,
) -> jax.Array:
    """cuDNN's own packed segments, by a private function under jax.nn, for at most `most` runs a row.

    Padding counts as one more run, so that every token is written. Before jax 0.11 the offsets of k and v
    were computed with q's number of heads (`_fix_seqlen_offsets`): wrong when heads are shared.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    B = segment_ids.shape[0]
    starts = jnp.concatenate([jnp.ones((B, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    run = jnp.cumsum(starts, axis=1) - 1
    lengths = jax.vmap(lambda run: jnp.bincount(run, length=most))(run).astype(jnp.int32)
    offsets = jnp.cumsum(lengths, axis=1) - lengths
    used = lengths > 0
    lengths = jnp.where(used, lengths, -1)
    offsets = jnp.pad(jnp.where(used, offsets, -1), ((0, 0), (0, 1)), constant_values=-1).astype(jnp.int32)
    out = dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets,
        scale=1.0, mask_type=MaskType.CAUSAL, sliding_window_length=window,
    )  # fmt: skip
    return jnp.where((segment_ids != 0)[:, :, None, None], out, 0)


def candidates(dim: int, interpret: bool) -> dict[str, Callable[..., jax.Array]]:
    found: dict[str, Callable[..., jax.Array]] = {
        "pallas": partial(kernels.attention, interpret=interpret),
        "cudnn": ladder.RUNGS["cudnn"],
        "cudnn packed": packed_cudnn,
        "xla": ladder.RUNGS["xla"],
        "reference": ladder.RUNGS["reference"],
    }
    if dim > 256:
        del found["cudnn"], found["cudnn packed"]
    return found


def forward(rung: Callable[..., jax.Array], window: int | None) -> Any:
    return jax.jit(lambda q, k, v, d_out, segment_ids: rung(q, k, v, segment_ids=segment_ids, window=window))


def forward_and_backward(rung: Callable[..., jax.Array], window: int | None) -> Any:
    def function(q, k, v, d_out, segment_ids):
        out, pull = jax.vjp(lambda q, k, v: rung(q, k, v, segment_ids=segment_ids, window=window), q, k, v)
        return out, *pull(d_out)

    return jax.jit(function)


def compiled_or_error(function: Any, *arguments: Any) -> Any:
    """The compiled function, or the exception that says why there is none."""
    try:
        return function.lower(*arguments).compile()
    except Exception as error:
        return error


Programs = dict[tuple[str, str, str], Any]


def programs(shapes: dict[str, Shape], interpret: bool, threads: int) -> Programs:
    """Every candidate at every shape, "forward" and "both", compiled side by side."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        futures = {
            (name, rung, part): pool.submit(
                compiled_or_error, make(function, shape.window), *jax.eval_shape(partial(inputs, shape))
            )
            for name, shape in shapes.items()
            for rung, function in candidates(shape.dim, interpret).items()
            for part, make in (("both", forward_and_backward), ("forward", forward))
        }
        futures |= {(name, "exact", "both"): pool.submit(exact, shape) for name, shape in shapes.items()}
        found = {key: future.result() for key, future in futures.items()}
    report("compiled", programs=len(found), seconds=time.perf_counter() - begin)
    return found


def exact(shape: Shape) -> Any:
    """The definition in float32, compiled without TF32."""
    given = jax.eval_shape(partial(inputs, shape))
    wide = (jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in given[:4])
    with jax.default_matmul_precision("highest"):
        return compiled_or_error(
            forward_and_backward(ladder.RUNGS["reference"], shape.window), *wide, given.segment_ids
        )


def usable(program: Any) -> Any:
    if isinstance(program, Exception):
        raise program
    return program


# --- Parity -------------------------------------------------------------------------------------------------


@jax.jit
def errors(value: jax.Array, reference: jax.Array, padding: jax.Array) -> tuple[jax.Array, ...]:
    """Relative error of all, of the worst row (to the average row), and the largest entry of padding."""
    value, reference = value.astype(jnp.float32), reference.astype(jnp.float32)
    norm = jnp.linalg.norm(reference, axis=-1)
    difference = jnp.linalg.norm(value - reference, axis=-1)
    outside = jnp.abs(jnp.where(padding[:, :, None, None], value, 0)).max()
    mean_square = jnp.sqrt(jnp.mean(norm**2))
    return (
        jnp.sqrt(jnp.sum(difference**2)) / jnp.linalg.norm(norm),
        difference.max() / mean_square,
        outside,
    )


def parity(clock: Clock, shapes: dict[str, Shape], found: Programs, interpret: bool) -> None:
    """Each rung's output and gradients against the dense reference in float32 on the same bfloat16 inputs."""
    for name, shape in shapes.items():
        given = inputs(shape)
        wide = (array.astype(jnp.float32) for array in given[:4])
        expected = usable(found[name, "exact", "both"])(*wide, given.segment_ids)
        for rung in candidates(shape.dim, interpret):

            def compare(rung=rung, name=name, given=given, expected=expected):
                results = usable(found[name, rung, "both"])(*given)
                figures = {
                    part: [float(f"{float(e):.3g}") for e in errors(a, b, given.segment_ids == 0)]
                    for part, a, b in zip(("out", "dq", "dk", "dv"), results, expected, strict=True)
                }
                good = all(
                    total < TOLERANCE and row < ROW_TOLERANCE and padding == 0
                    for total, row, padding in figures.values()
                )
                report("parity", shape=name, rung=rung, good=good, **figures)

            clock.run(compare, chapter="parity", shape=name, rung=rung)


# --- Speed --------------------------------------------------------------------------------------------------


def seconds(function: Callable[..., Any], *arguments: Any, at_least: float = 0.05) -> float:
    """Median of three seconds-a-call, of many calls in flight; the first call is left out."""
    jax.block_until_ready(function(*arguments))
    calls = 2
    samples: list[float] = []
    while len(samples) < 3:
        begin = time.perf_counter()
        out = None
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        spent = time.perf_counter() - begin
        if spent < at_least and calls < 4096:
            calls *= 2
        else:
            samples.append(spent / calls)
    return statistics.median(samples)


def speed(clock: Clock, shapes: dict[str, Shape], found: Programs, interpret: bool) -> None:
    for name, shape in shapes.items():
        given = inputs(shape)
        work = visible_pairs(given.segment_ids, shape.window) * shape.heads * shape.dim
        for rung in candidates(shape.dim, interpret):

            def measure(rung=rung, name=name, given=given, work=work):
                once = seconds(usable(found[name, rung, "forward"]), *given)
                both = seconds(usable(found[name, rung, "both"]), *given)
                report(
                    "speed",
                    shape=name,
                    rung=rung,
                    forward_ms=once * 1e3,
                    both_ms=both * 1e3,
                    forward_tflops=4 * work / once / 1e12,
                    both_tflops=14 * work / both / 1e12,
                )

            clock.run(measure, chapter="speed", shape=name, rung=rung)


def long_context(clock: Clock, lengths: tuple[int, ...], interpret: bool) -> None:
    """One row of one long example: bytes beside arguments and results must grow linearly."""
    for length, rung in itertools.product(lengths, ("pallas", "xla")):
        shape = SHAPES["E4B global"]._replace(batch=1, length=length)
        if interpret:
            shape = shape._replace(dim=32)

        def measure(length=length, rung=rung, shape=shape):
            given = inputs(shape, jnp.ones((1, length), jnp.int32))
            function = forward_and_backward(candidates(shape.dim, interpret)[rung], None)
            compiled = function.lower(*given).compile()
            memory = compiled.memory_analysis()
            found = compiled(*given)
            finite = all(bool(jnp.isfinite(array).all()) for array in found)
            both = seconds(compiled, *given)
            work = length * (length + 1) // 2 * shape.heads * shape.dim
            report(
                "long",
                length=length,
                rung=rung,
                finite=finite,
                temporary_mib=memory.temp_size_in_bytes / 2**20,
                both_ms=both * 1e3,
                both_tflops=14 * work / both / 1e12,
            )

        clock.run(measure, chapter="long", length=length, rung=rung)


# --- Sweep --------------------------------------------------------------------------------------------------

SHARED_MEMORY = 227 * 1024  # bytes a program can have on Hopper


def tilings(kernel: str, dim: int) -> Iterator[Tiling]:
    """Tilings worth a try: accumulators within the registers, blocks within shared memory."""
    sizes = (16, 32, 64, 128)
    for queries, keys, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3)):
        held, moving = (queries, keys) if kernel in ("forward", "dq") else (keys, queries)
        held_blocks = 1 if kernel in ("forward", "dv") else 2
        shared = 2 * dim * (held_blocks * held + 2 * moving * max(1, stages - 1))
        accumulators = (2 if kernel == "dk dv" else 1) * held * dim
        if (
            32 <= accumulators / (32 * warps) <= 128  # registers of a thread
            and shared <= SHARED_MEMORY
            and held * dim >= 2**14
            and 2**13 <= moving * dim <= 2**15
        ):
            yield Tiling(queries, keys, warps, stages)


def sweep(clock: Clock, shape: Shape, interpret: bool, threads: int) -> None:
    """Times each kernel alone over `tilings`, then the best of them together."""
    given = inputs(shape)
    q, k, v, d_out, segment_ids = given
    out, log_sum = jax.jit(partial(kernels.forward, shape.window, kernels.SMALL.forward, interpret))(
        q, k, v, segment_ids
    )
    delta = jnp.einsum("bthd,bthd->bht", out, d_out, preferred_element_type=jnp.float32)
    backward_arguments = (q, k, v, d_out, log_sum, delta, segment_ids)
    pairs = visible_pairs(segment_ids, shape.window) * shape.heads * shape.dim
    best: dict[str, tuple[float, Tiling]] = {}
    for kernel in ("forward", "dq", "dk dv", "dk", "dv"):
        if clock.over():
            report("skipped", chapter="sweep", dim=shape.dim, kernel=kernel)
            continue
        arguments = (q, k, v, segment_ids) if kernel == "forward" else backward_arguments

        def build(tiling: Tiling, kernel=kernel, arguments=arguments) -> Any:
            if clock.over():
                return TimeoutError("no time left")
            function: Any
            if kernel == "forward":
                function = partial(kernels.forward, shape.window, tiling, interpret)
            elif kernel == "dq":
                function = partial(kernels.query_gradient, shape.window, tiling, interpret)
            else:
                wanted = tuple(kernel.split())
                function = partial(kernels.key_value_gradient, shape.window, tiling, interpret, wanted)
            return compiled_or_error(jax.jit(function), *arguments)

        operations = {"forward": 4, "dq": 6, "dk dv": 8, "dk": 6, "dv": 4}[kernel]
        tried = [Tiling(16, 32), Tiling(32, 16)] if interpret else list(tilings(kernel, shape.dim))
        with ThreadPoolExecutor(threads) as pool:
            built = list(pool.map(build, tried))
        results, failed = [], []
        for tiling, compiled in zip(tried, built, strict=True):
            row = [tiling.queries, tiling.keys, tiling.warps, tiling.stages]
            try:
                spent = seconds(usable(compiled), *arguments, at_least=0.01)
            except Exception as error:
                failed.append([*row, f"{type(error).__name__}: {error}"[:90]])
                continue
            results.append([*row, float(f"{spent * 1e3:.4g}"), round(operations * pairs / spent / 1e12)])
            if kernel not in best or spent < best[kernel][0]:
                best[kernel] = (spent, tiling)
        report(
            "sweep",
            dim=shape.dim,
            window=shape.window,
            kernel=kernel,
            columns="queries keys warps stages ms tflops",
            best=sorted(results, key=lambda row: row[4])[:12],
            slower=len(results[12:]),
            failed=len(failed),
            failures=failed[:3],
        )
    if not {"forward", "dq", "dk dv", "dk", "dv"} <= best.keys():
        return
    report("best", dim=shape.dim, **{kernel: dataclasses.astuple(t) for kernel, (_, t) in best.items()})
    chosen = {kernel: tiling for kernel, (_, tiling) in best.items()}
    for label, dkv in (
        ("dk and dv together", chosen["dk dv"]),
        ("dk and dv apart", (chosen["dk"], chosen["dv"])),
    ):
        rung = partial(
            kernels.attention, tuning=Tuning(chosen["forward"], chosen["dq"], dkv), interpret=interpret
        )
        spent = seconds(forward_and_backward(rung, shape.window), *given)
        report("speed", rung=f"pallas, best of the sweep, {label}", dim=shape.dim, both_ms=spent * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this time")
    parser.add_argument(
        "--chapters",
        default="parity,speed,long,sweep",
        help="comma-separated, of parity, speed, long and sweep; run in this order",
    )
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this")
    parser.add_argument("--threads", type=int, default=12, help="programs compiled at a time")
    parser.add_argument("--tiny", action="store_true", help="small shapes, interpreted kernels, any platform")
    options = parser.parse_args()
    clock, chapters = Clock(options.seconds), options.chapters.split(",")
    shapes = {name: shape for name, shape in SHAPES.items() if options.shapes in name}
    if options.tiny:
        shapes = {
            name: Shape(2, 96, 4, 2, shape.dim // 16, shape.window and 24) for name, shape in shapes.items()
        }
    device = jax.devices()[0]
    report("device", kind=device.device_kind, jax=jax.__version__)
    if {"parity", "speed"} & set(chapters):
        found = programs(shapes, options.tiny, options.threads)
    if "parity" in chapters:
        parity(clock, shapes, found, options.tiny)
    if "speed" in chapters:
        speed(clock, shapes, found, options.tiny)
    if "long" in chapters:
        long_context(clock, (64, 128) if options.tiny else (8192, 32768), options.tiny)
    if "sweep" in chapters:
        for name in ("E4B global", "E4B local"):
            if name in shapes:
                clock.run(
                    partial(sweep, clock, shapes[name], options.tiny, options.threads),
                    chapter="sweep",
                    shape=name,
                )
    report("done", unused_s=clock.end - time.perf_counter())


if __name__ == "__main__":
    main()
