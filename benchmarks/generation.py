"""Speed and memory of generation: reading prompts, and adding a token to every answer of a batch.

    python benchmarks/generation.py                                  # the table of docs/evaluation.md
    python benchmarks/generation.py --case='{"model": "e4b", "rows": 64}'

Weights are random and made on the device. One JSON object a line. A step reads every matrix, the embedding
table (for the logits) and the cache once: the floor is that many bytes at the rate at which this device reads
memory, measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from gpu import run_apart  # noqa: E402
from step import decoder  # noqa: E402

NF4 = {"weights": "nf4"}
CASES: dict[str, dict[str, Any]] = {
    "e2b": {"model": "e2b"},
    "e4b": {"model": "e4b"},
    "e4b, 1 row": {"model": "e4b", "rows": 1},
    "e4b nf4": {"model": "e4b", "quantization": NF4},
    "31b nf4": {"model": "31b", "quantization": NF4},
    "26b-a4b nf4": {"model": "26b_a4b", "quantization": NF4},
}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One row of the table, in this process."""
    from keras_gemma_ft import compilation

    compilation.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from keras_gemma_ft.model import decoding, gemma4, loading

    config = decoder(case["model"])
    rows, prompt, new = case.get("rows", 32), case.get("prompt", 512), case.get("new", 128)
    source = loading.RandomSource(config)
    params = dict(loading.load(source, "bfloat16", case.get("quantization")))
    settings = dataclasses.replace(gemma4.Settings(remat="none"), **case.get("settings", {}))
    plan = decoding.Plan(config, settings, decoding.Sampling(), (), new)
    rng = np.random.default_rng(0)
    given = (
        params,
        None,
        rng.integers(3, config.vocab_size, (rows, prompt)).astype(np.int32),
        rng.integers(prompt // 2 + 1, prompt + 1, rows).astype(np.int32),
        jax.random.split(jax.random.key(0), rows),
    )
    result: dict[str, Any] = dict(case)
    for attempt in ("first", "again"):
        began = time.perf_counter()
        state = jax.block_until_ready(decoding.prefill(plan, *given))
        result[f"prefill_{attempt}_s"] = round(time.perf_counter() - began, 4)
        began = time.perf_counter()
        state = jax.block_until_ready(decoding.extend(plan, state, params, None, 2))
        result[f"extend_{attempt}_s"] = round(time.perf_counter() - began, 4)
    began = time.perf_counter()
    state = jax.block_until_ready(decoding.extend(plan, state, params, None, new))
    seconds = (time.perf_counter() - began) / (new - 2)
    cache = _bytes(state.cache)
    read = cache + sum(_bytes(value) for name, value in params.items() if name != "embed_tokens_per_layer")
    memory = jax.local_devices()[0].memory_stats() or {}
    bandwidth = _bandwidth(jax, jnp)
    if "profile" in case:
        from kernel_times import profiled

        state = decoding.prefill(plan, *given)
        result |= profiled(lambda: decoding.extend(plan, state, params, None, 9), exact=False)
    return {
        **result,
        "prompt_tokens_per_second": round(float(given[3].sum()) / result["prefill_again_s"]),
        "step_ms": round(1000 * seconds, 3),
        "tokens_per_second": round(rows / seconds),
        "floor_ms": round(1000 * read / bandwidth, 3),
        "of_floor": round(read / bandwidth / seconds, 3),
        "cache_gib": round(cache / 2**30, 2),
        "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
        "gb_per_second": round(bandwidth / 1e9),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bandwidth(jax: Any, jnp: Any) -> float:
    """Bytes a second of reading a large array."""
    size = 2**30 if jax.default_backend() != "cpu" else 2**24
    array = jnp.ones(size, jnp.bfloat16)
    read = jax.jit(lambda x: x.reshape(-1, 2**14).astype(jnp.float32).sum())
    for repeats in (5, 50):  # the first time to warm up
        began = time.perf_counter()
        for _ in range(repeats):
            total = read(array)
        total.block_until_ready()
        seconds = (time.perf_counter() - began) / repeats
    return 2 * size / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--case", help="one row, as JSON, in this process")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(json.loads(given.case))), flush=True)
        return
    for name, case in CASES.items():
        if given.only in name:
            result = run_apart(__file__, [f"--case={json.dumps(case)}"], 240)
            print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main()
