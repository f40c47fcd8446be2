"""Training speed and memory of every Gemma 4 size on the accelerator at hand: the table of the README.

    python benchmarks/gpu.py                        # all rows
    python benchmarks/gpu.py --only=e4b,31b         # rows whose name holds "e4b" or "31b"
    python benchmarks/gpu.py --warm                 # the first step a second time, its program in the cache
    python benchmarks/gpu.py --vs-peft              # beside it the same steps in transformers and PEFT
    python benchmarks/gpu.py --case='--model=e4b --remat=none'

A row is a command line of benchmarks/step.py, which says what the figures are, and of its counterpart
peft_step.py. Each measurement has a process of its own, and each row a cache of compiled programs that starts
empty, unless $KERAS_GEMMA_FT_CACHE names one. One JSON object a line; "out of memory" is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = "KERAS_GEMMA_FT_CACHE"
LARGE = "--method=qlora --quantization=nf4,embedding=nf4"
QLORA = f"{LARGE},per_layer_embedding=host"
HOST = "--quantization=per_layer_embedding=host"
FAST = "--remat=matmuls --unroll"

# Lean: little memory. Fast: memory is there to be used. Smallest: one row. Why these: docs/performance.md.
CASES: dict[str, str] = {
    "e2b lora lean": f"--model=e2b {HOST} --remat=outputs",
    "e2b lora fast": f"--model=e2b {FAST}",
    "e2b lora smallest": f"--model=e2b {HOST} --rows=1",
    "e2b qlora lean": f"--model=e2b {QLORA} --remat=down",
    "e2b qlora smallest": f"--model=e2b {QLORA} --rows=1",
    "e4b lora lean": f"--model=e4b {HOST} --remat=outputs",
    "e4b lora fast": f"--model=e4b {FAST}",
    "e4b lora smallest": f"--model=e4b {HOST} --rows=1",
    "e4b qlora lean": f"--model=e4b {QLORA} --remat=down",
    "e4b qlora fast": f"--model=e4b {QLORA} {FAST}",
    "e4b qlora smallest": f"--model=e4b {QLORA} --rows=1",
    "26b-a4b lora lean": "--model=26b_a4b --micro-batch=1",
    "26b-a4b lora smallest": "--model=26b_a4b --rows=1",
    "26b-a4b qlora lean": f"--model=26b_a4b {LARGE}",
    "26b-a4b qlora smallest": f"--model=26b_a4b {LARGE} --rows=1",
    "31b lora lean": "--model=31b --micro-batch=1",
    "31b lora smallest": "--model=31b --rows=1",
    "31b qlora lean": f"--model=31b {LARGE} --micro-batch=2 --remat=sublayers",
    "31b qlora fast": f"--model=31b {LARGE} --remat=feed_forward --unroll",
    "31b qlora smallest": f"--model=31b {LARGE} --rows=1",
    "e4b lora 32k": "--model=e4b --rows=1 --length=32768",
}


def measure(case: Sequence[str], seconds: float, warm: bool, vs_peft: bool) -> dict[str, Any]:
    """A row of the table.

    Args:
        case: Arguments of step.py.
        seconds: The most that each measurement may take.
        warm: Whether the first step is measured again, in a new process.
        vs_peft: Whether PEFT's step is measured, too.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = {CACHE: directory, **os.environ}
        result = run_apart(HERE / "step.py", case, seconds, environment)
        if warm and "error" not in result:
            again = run_apart(HERE / "step.py", [*case, "--steps=1"], seconds, environment)
            names = ("trace_s", "compile_s", "compile_cached", "first_step_s", "error")
            result["warm"] = {name: again[name] for name in names if name in again}
    if vs_peft:
        theirs = run_apart(HERE / "peft_step.py", case, seconds)
        result["peft"] = theirs
        if "error" not in result and "error" not in theirs:
            result["ours_to_peft"] = {
                name: round(result[name] / theirs[name], 3) for name in ("tokens_per_second", "peak_gib")
            }
    return result


def run_apart(
    program: str | Path,
    arguments: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Runs a program of this folder in its own process; the last JSON object that it prints, or `error`."""
    path = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            env={**environment, "PYTHONPATH": path},
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not done.returncode and lines:
        return json.loads(lines[-1])
    if re.search(r"^[\w.]+Error: .*(RESOURCE_EXHAUSTED|out of memory)", done.stderr, re.MULTILINE):
        return {"error": "out of memory"}
    tail = [line for line in done.stderr.splitlines() if line.strip()][-12:]
    return {"error": " | ".join(tail)[-1500:] or f"ended with status {done.returncode}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name holds one of these, with commas between")
    parser.add_argument("--case", help="a row that is not in the table: arguments of step.py")
    parser.add_argument("--warm", action="store_true", help="measure the first step with a warm cache, too")
    parser.add_argument("--vs-peft", action="store_true", help="measure transformers and PEFT, too")
    parser.add_argument("--seconds", type=float, default=240, help="the most that one measurement may take")
    given = parser.parse_args()
    parts = given.only.split(",")
    cases = {name: case for name, case in CASES.items() if any(part in name for part in parts)}
    for name, case in {given.case: given.case}.items() if given.case else cases.items():
        result = measure(shlex.split(case), given.seconds, given.warm, given.vs_peft)
        print(json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    main()
