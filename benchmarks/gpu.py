"""Training speed and memory of every Gemma 4 size on the accelerator at hand.

    python benchmarks/gpu.py                        # the table of the README
    python benchmarks/gpu.py --only=e4b             # rows whose name holds "e4b"
    python benchmarks/gpu.py --case='{"model": "e4b", "method": "lora", "settings": {"remat": "none"}}'

Weights are random and made on the device; rows are packed, of two to six examples; LoRA has rank 16 on all
seven roles with dropout 0.05. Each row runs in a process of its own. One JSON object a line: tokens a second,
peak memory, time to the first step, and the ratio to the floor: the matrix products alone (4 N FLOPs a
token for N frozen parameters in matrices, and 4 V D for the loss) at the rate that this run measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 2048
NF4 = {"weights": "nf4"}
SMALL = {"weights": "nf4", "embedding": "int8", "per_layer_embedding": "nf4"}
LEAN, FAST = {"remat": "full"}, {"remat": "matmuls"}

# name → what is run; a row of the table each. `quantization` None: LoRA on bfloat16 weights.
CASES: dict[str, dict[str, Any]] = {
    "e2b lora lean": {"model": "e2b", "settings": LEAN},
    "e2b lora fast": {"model": "e2b", "settings": FAST},
    "e2b qlora lean": {"model": "e2b", "quantization": SMALL, "settings": LEAN},
    "e2b qlora smallest": {"model": "e2b", "quantization": SMALL, "settings": LEAN, "rows": 1},
    "e4b lora lean": {"model": "e4b", "settings": LEAN},
    "e4b lora fast": {"model": "e4b", "settings": FAST},
    "e4b qlora lean": {"model": "e4b", "quantization": SMALL, "settings": LEAN},
    "e4b qlora fast": {"model": "e4b", "quantization": NF4, "settings": FAST},
    "e4b qlora smallest": {"model": "e4b", "quantization": SMALL, "settings": LEAN, "rows": 1},
    "26b-a4b qlora lean": {"model": "26b_a4b", "quantization": SMALL, "settings": LEAN},
    "26b-a4b qlora smallest": {"model": "26b_a4b", "quantization": SMALL, "settings": LEAN, "rows": 1},
    "31b qlora lean": {"model": "31b", "quantization": SMALL, "settings": LEAN},
    "31b qlora fast": {"model": "31b", "quantization": NF4, "settings": FAST},
    "31b qlora smallest": {"model": "31b", "quantization": SMALL, "settings": LEAN, "rows": 1},
    "e4b lora 32k": {"model": "e4b", "settings": LEAN, "rows": 1, "length": 32768},
}


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


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One row of the table, in this process."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from keras_gemma_ft import compilation

    compilation.prepare()
    import jax

    from keras_gemma_ft.model import loading
    from keras_gemma_ft.model.causal_lm import GemmaCausalLM
    from keras_gemma_ft.train.optimizers import adamw

    config = decoder(case["model"])
    quantization = case.get("quantization")
    began = time.perf_counter()
    source = loading.RandomSource(config)
    model = GemmaCausalLM(
        config, weights=loading.load(source, "bfloat16", quantization), quantization=quantization
    )
    model.enable_lora(16, dropout=0.05)
    model.compile(
        optimizer=adamw(1e-4, total_steps=1000),
        micro_batch_size=case.get("micro_batch_size"),
        settings=case.get("settings"),
    )
    model.optimizer.build(model.trainable_variables)
    rows, length = case.get("rows", 4), case.get("length", LENGTH)
    batch = {name: jax.device_put(value) for name, value in packed_batch(config, rows, length).items()}
    jax.block_until_ready([variable.value for variable in model.variables])
    made = time.perf_counter()
    state = (
        [variable.value for variable in model.trainable_variables],
        [variable.value for variable in model.non_trainable_variables],
        [variable.value for variable in model.optimizer.variables],
        [],
    )
    for variable in [*model.variables, *model.optimizer.variables]:  # as `fit` does: the state is donated
        variable._value = None
    weights_bytes = _bytes_in_use()
    lowered = jax.jit(model.train_step, donate_argnums=0).lower(state, batch)
    traced = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter()
    logs, state = step(state, batch)
    losses = [float(logs["loss"])]
    first = time.perf_counter()
    steps = case.get("steps", 8)
    logged = []
    began_steps = time.perf_counter()
    for _ in range(steps):  # as `fit` does, nothing waits for a step before the next is dispatched
        logs, state = step(state, batch)
        logged.append(logs["loss"])
    losses += [float(loss) for loss in logged]
    seconds = (time.perf_counter() - began_steps) / steps
    kernels = {}
    if case.get("profile"):
        kernels = profiled(lambda: step(state, batch), exact="program" in case)
    if "program" in case:
        Path(case["program"]).write_text(step.as_text(), encoding="utf-8")
    tokens = rows * length
    memory = jax.local_devices()[0].memory_stats() or {}
    analysis = step.memory_analysis()
    return {
        **case,
        "tokens_per_second": round(tokens / seconds),
        "step_ms": round(1000 * seconds, 2),
        "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
        "step_gib": round(
            (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
             - analysis.alias_size_in_bytes) / 2**30, 2),
        "state_gib": round(weights_bytes / 2**30, 2),
        "make_s": round(made - began, 1),
        "trace_s": round(traced - made, 1),
        "compile_s": round(compiled - traced, 1),
        "first_step_s": round(first - made, 1),
        "floor_tflop": round(floor_flops(config, tokens) / 1e12, 2),
        **kernels,
        "losses": [round(loss, 4) for loss in losses[:: max(1, steps // 2)]],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }  # fmt: skip


def profiled(run: Any, exact: bool) -> dict[str, Any]:
    """Where one step's time goes: milliseconds and calls by kernel, the longest first.

    Args:
        run: Makes the step.
        exact: Kernels by their full names, as the compiled program has them; else without their numbers.
    """
    import collections
    import re
    import tempfile

    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        times: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
        for plane in planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    entry = times[event.name if exact else re.sub(r"[_.]?\d+", "", event.name)[:70]]
                    entry[0] += event.duration_ns / 1e6
                    entry[1] += 1
    longest = sorted(times.items(), key=lambda item: -item[1][0])
    return {
        "kernel_ms": round(sum(time for time, _ in times.values()), 1),
        "kernels": {name: [round(time, 2), count] for name, (time, count) in longest[: 400 if exact else 40]},
    }


def _bytes_in_use() -> int:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)


def floor_flops(config: Any, tokens: int) -> float:
    """FLOPs of the matrix products that no step can do without: forward, input gradients, loss."""
    from keras_gemma_ft.model.weights import table

    active = 0.0
    for weight in table(config).values():
        share = config.top_k_experts / config.num_experts if weight.use == "experts" else 1.0
        active += weight.size * share if weight.use in ("matrix", "experts") else 0
    return 4 * (active + config.vocab_size * config.hidden_size) * tokens


def ceiling() -> dict[str, Any]:
    """The rate of one large bfloat16 product, many in flight."""
    import jax
    import jax.numpy as jnp

    rows, inner, out = (8192, 2560, 20480) if jax.default_backend() != "cpu" else (256, 256, 256)
    a = jax.random.normal(jax.random.key(0), (rows, inner), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (out, inner), jnp.bfloat16)
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ()))))
    for repeats in (20, 200):  # the first time to warm up
        began = time.perf_counter()
        for _ in range(repeats):
            result = product(a, b)
        result.block_until_ready()
        seconds = (time.perf_counter() - began) / repeats
    return {
        "ceiling_tflops": round(2 * rows * inner * out / seconds / 1e12, 1),
        "device": jax.devices()[0].device_kind,
    }


def run_apart(arguments: list[str], seconds: float, program: str = __file__) -> dict[str, Any]:
    """Runs a program of this folder with some arguments in its own process; its last line is the result."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, program, *arguments],
            env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        return {"error": " | ".join(tail)[-1500:]}
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name holds one of these, with commas between")
    parser.add_argument("--case", help="one row, as JSON, in this process")
    parser.add_argument("--ceiling", action="store_true", help="the matrix-product rate alone")
    parser.add_argument("--seconds", type=float, default=240, help="the most that one row may take")
    given = parser.parse_args()
    if given.ceiling:
        print(json.dumps(ceiling()), flush=True)
        return
    if given.case:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(measure(json.loads(given.case))), flush=True)
        return
    top = run_apart(["--ceiling"], given.seconds)
    print(json.dumps(top), flush=True)
    for name, case in CASES.items():
        if given.only and not any(part in name for part in given.only.split(",")):
            continue
        result = run_apart([f"--case={json.dumps(case)}"], given.seconds)
        if "step_ms" in result and "ceiling_tflops" in top:
            floor_ms = result["floor_tflop"] / top["ceiling_tflops"] * 1000
            result["floor_ms"] = round(floor_ms, 1)
            result["of_floor"] = round(floor_ms / result["step_ms"], 3)
        print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main()
