"""Speed, memory and time to the first step of one training step, on whatever device is there.

    python benchmarks/step.py --preset=gemma4_tiny                           # a preset's own weights
    python benchmarks/step.py --model=e4b --remat=matmuls --micro-batch=2    # random ones of E4B's shapes
    python benchmarks/step.py --model=31b --method=qlora --quantization=nf4,embedding=int8 --rows=1

Random weights are made on the device. Rows are packed, of two to six examples; LoRA has rank 16 on all seven
roles, with dropout 0.05. Prints one JSON object, among it:

    tokens_per_second, step_ms      of steps that follow the first
    peak_gib, peak_of               the most memory in use: of the device, else of the process
    compile_s, compile_cached       the step's program, and whether it was found in the cache
    first_step_s                    from a model that is ready to the end of its first step
    ceiling_tflops                  the rate of one large matrix product, in this process
    floor_ms, of_floor              the matrix products of a step at that rate, and their share of step_ms

The floor counts 4 N FLOPs a token for N frozen parameters in matrices (forward, and gradients of inputs) and
4 V D for the loss; 6 where all weights are trained. In the published models less than 1% of that is never
computed: nothing asks for gradients of what comes before the first adapter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from keras_gemma_ft import __version__, compilation
from keras_gemma_ft.config import BY_NAME
from keras_gemma_ft.errors import UserError

RANK, DROPOUT, LEARNING_RATE = 16, 0.05, 2e-4
MODELS = ("tiny", "e2b", "e4b", "26b_a4b", "31b")

# --- The case -----------------------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The case that a command line describes; leaves with status 2 where it describes none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--model", choices=MODELS, help="random weights in the shapes of a model")
    weights.add_argument("--preset", help="a preset's weights: a name, a directory or a handle")
    parser.add_argument("--method", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument(
        "--quantization",
        type=quantization_parts,
        help="KIND or PART=KIND, with commas between; lora takes per_layer_embedding=host and no other",
    )
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--micro-batch", type=int, help="rows on the device at once; all unless given")
    parser.add_argument(
        "--remat",
        choices=[choice for choice in BY_NAME["train.remat"].choices if choice != "auto"],
        default="full",
        help="what the backward pass computes again",
    )
    parser.add_argument("--unroll", action="store_true", help="write all layers out")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="other fields of gemma4.Settings, as JSON"
    )
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=8, help="that are timed, after the first")
    parser.add_argument("--profile", action="store_true", help="kernels of one more step by time")
    parser.add_argument("--program", help="a file for the compiled program; the profile then has its names")
    case = parser.parse_args(given)
    if case.method == "qlora":
        case.quantization = {"weights": "nf4", **(case.quantization or {})}
    elif case.quantization and (case.method, case.quantization) != ("lora", {"per_layer_embedding": "host"}):
        parser.error("--quantization goes with --method=qlora; per_layer_embedding=host also with lora")
    for name in ("rows", "length", "micro_batch", "steps"):
        if (value := getattr(case, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    return case


def quantization_parts(given: str) -> dict[str, str]:
    """`nf4,embedding=int8` → weights in NF4, and the embedding in int8."""
    parts = (part.rpartition("=") for part in given.split(","))
    return {name or "weights": kind for name, _, kind in parts}


def described(case: argparse.Namespace) -> dict[str, Any]:
    """What of a case belongs to its result."""
    return {name: value for name, value in vars(case).items() if value not in (None, {}, False)}


def decoder(model: str) -> Any:
    """The published shapes of a model, by numbers alone."""
    from keras_gemma_ft.model.config import FULL, SLIDING, Gemma4Config

    edge = {"num_attention_heads": 8, "hidden_size_per_layer_input": 256}
    edge["vocab_size_per_layer_input"] = 262_144
    large = {"attention_k_eq_v": True, "sliding_window": 1024}
    shapes: dict[str, dict[str, Any]] = {
        "e2b": {**edge, "layers": 35, "period": 5, "hidden_size": 1536, "intermediate_size": 6144,
                "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True},
        "e4b": {**edge, "layers": 42, "period": 6, "hidden_size": 2560, "intermediate_size": 10240,
                "num_key_value_heads": 2, "num_kv_shared_layers": 18},
        "26b_a4b": {**large, "layers": 30, "period": 6, "hidden_size": 2816, "intermediate_size": 2112,
                    "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
                    "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        "31b": {**large, "layers": 60, "period": 6, "hidden_size": 5376, "intermediate_size": 21504,
                "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4},
        "tiny": {**edge, "layers": 6, "period": 3, "hidden_size": 64, "intermediate_size": 128,
                 "num_key_value_heads": 2, "num_kv_shared_layers": 3, "head_dim": 16, "global_head_dim": 32,
                 "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 64},
    }  # fmt: skip
    shape = {"vocab_size": 262_144, "head_dim": 256, "global_head_dim": 512, **shapes[model]}
    layers, period = shape.pop("layers"), shape.pop("period")
    types = tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))
    return Gemma4Config(layer_types=types, **shape)


def packed_batch(config: Any, rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Random tokens in rows of two to six examples that fill them; all but each first token is learned."""
    import numpy as np

    random = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(random.choice(np.arange(1, length), random.integers(1, 6), replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, length], strict=True), 1):
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    return {
        "token_ids": random.integers(3, config.vocab_size, (rows, length)).astype(np.int32),
        "positions": positions,
        "segment_ids": segments,
        "loss_mask": positions > 0,
    }


# --- The measurement ----------------------------------------------------------------------------------------


def measure(case: argparse.Namespace) -> dict[str, Any]:
    """Makes the model of a case and times its training step, in this process."""
    import jax
    import keras

    began = time.perf_counter()
    model = _model(case)
    model.optimizer.build(model.trainable_variables)
    batch = packed_batch(model.config, case.rows, case.length)
    batch = {name: jax.device_put(value) for name, value in batch.items()}
    jax.block_until_ready([variable.value for variable in model.variables])
    made = time.perf_counter()
    state = (
        [variable.value for variable in model.trainable_variables],
        [variable.value for variable in model.non_trainable_variables],
        [variable.value for variable in model.optimizer.variables],
        [],
    )
    trainable = sum(array.size for array in state[0])
    state_bytes = sum(array.nbytes for part in state for array in part)
    for variable in [*model.variables, *model.optimizer.variables]:  # as `fit` does: the state is donated
        variable._value = None

    lowered = jax.jit(model.train_step, donate_argnums=0).lower(state, batch)
    traced = time.perf_counter()
    step, cached = _compiled(lowered)
    compiled = time.perf_counter()
    logs, state = step(state, batch)
    losses = [float(logs["loss"])]
    first = time.perf_counter()

    logged = []
    began_steps = time.perf_counter()
    for _ in range(case.steps):  # as `fit` does, nothing waits for a step before the next is dispatched
        logs, state = step(state, batch)
        logged.append(logs["loss"])
    losses += [float(loss) for loss in logged]
    seconds = (time.perf_counter() - began_steps) / case.steps
    peak = peak_memory()

    kernels = {}
    if case.profile:
        from kernel_times import profiled

        kernels = profiled(partial(step, state, batch), exact=case.program is not None)
    if case.program:
        Path(case.program).write_text(step.as_text(), encoding="utf-8")
    analysis = step.memory_analysis()
    del state, logs, logged
    rate = ceiling(case.precision)
    tokens = case.rows * case.length
    from keras_gemma_ft.model.flops import floor_flops

    floor = floor_flops(model.config, tokens, all_weights=case.method == "full") / rate
    return {
        **described(case),
        **figures(tokens, seconds, losses),
        **peak,
        "step_gib": round(
            (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
             - analysis.alias_size_in_bytes) / 2**30, 2),
        "state_gib": round(state_bytes / 2**30, 2),
        "trainable_parameters": trainable,
        "make_s": round(made - began, 1),
        "trace_s": round(traced - made, 1),
        "compile_s": round(compiled - traced, 1),
        "compile_cached": cached,
        "first_step_s": round(first - made, 1),
        "ceiling_tflops": round(rate / 1e12, 4 if rate < 1e12 else 1),
        "floor_ms": round(1000 * floor, 2),
        "of_floor": round(floor / seconds, 3),
        **kernels,
        "device": jax.devices()[0].device_kind,
        "versions": {"keras_gemma_ft": __version__, "jax": jax.__version__, "keras": keras.__version__},
    }  # fmt: skip


def figures(tokens: int, seconds: float, losses: Sequence[float]) -> dict[str, Any]:
    """What every measurement of a step has: its speed, its losses and its date."""
    return {
        "tokens_per_second": round(tokens / seconds),
        "step_ms": round(1000 * seconds, 2),
        "losses": [round(loss, 4) for loss in losses],
        "date": datetime.date.today().isoformat(),
    }


def process_memory() -> dict[str, Any]:
    """The most memory this process ever had, as the operating system counts it."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_gib": round(peak / 2**30, 2), "peak_of": "process (resident set)"}


def peak_memory() -> dict[str, Any]:
    """The most memory that was in use: of the device, else of the process."""
    import jax

    device = jax.local_devices()[0].memory_stats()
    if not device:
        return process_memory()
    return {"peak_gib": round(device["peak_bytes_in_use"] / 2**30, 2), "peak_of": "device"}


def _model(case: argparse.Namespace) -> Any:
    import keras

    from keras_gemma_ft.model import loading
    from keras_gemma_ft.model.causal_lm import GemmaCausalLM
    from keras_gemma_ft.presets import resolve_preset
    from keras_gemma_ft.train.optimizers import adamw

    if case.preset:
        source: Any = loading.open_source(resolve_preset(case.preset))
    else:
        source = loading.RandomSource(decoder(case.model))
    mixed = case.method == "full" and case.precision == "bfloat16"  # as training from a config does
    dtype = "mixed_bfloat16" if mixed else case.precision
    weights = loading.load(source, keras.DTypePolicy(dtype).variable_dtype, case.quantization)
    model = GemmaCausalLM(source.config, weights=weights, quantization=case.quantization, dtype=dtype)
    if case.method != "full":
        model.enable_lora(RANK, dropout=DROPOUT)
    model.compile(
        optimizer=adamw(LEARNING_RATE, schedule="constant", warmup_ratio=0.0),
        micro_batch_size=case.micro_batch,
        settings={"remat": case.remat, "unroll": case.unroll, **case.settings},
    )
    return model


def _compiled(lowered: Any) -> tuple[Any, bool]:
    """The program, and whether it came from JAX's cache on disk."""
    import jax

    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    program = lowered.compile()
    return program, "/jax/compilation_cache/cache_hits" in events


# --- The floor ----------------------------------------------------------------------------------------------


def ceiling(precision: str) -> float:
    """FLOP/s of one large product, many in flight."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    rows, inner, out = (1024, 1024, 1024) if on_cpu else (8192, 2560, 20480)
    a = jax.random.normal(jax.random.key(0), (rows, inner), precision)
    b = jax.random.normal(jax.random.key(1), (out, inner), precision)
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ()))))
    product(a, b).block_until_ready()
    repeats, seconds = 4, 0.0
    while seconds < 0.2:  # the short times warm up
        repeats *= 4
        began = time.perf_counter()
        for _ in range(repeats):
            result = product(a, b)
        result.block_until_ready()
        seconds = time.perf_counter() - began
    return 2 * rows * inner * out * repeats / seconds


def main() -> None:
    case = arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    compilation.prepare()
    try:
        print(json.dumps(measure(case)), flush=True)
    except (UserError, OSError) as error:
        print(f"step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
