"""The benchmarks of the training step: what they print, and that their floor is the one counted by hand."""

import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from keras_gemma_ft.model.flops import floor_flops
from keras_gemma_ft.model.gemma4 import Settings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS, LENGTH = 2, 32
SMALL = f"--precision=float32 --rows={ROWS} --length={LENGTH}"
PRESET, RANDOM = f"--preset=gemma4_tiny {SMALL} --steps=2", f"--model=tiny {SMALL} --micro-batch=1 --steps=4"
# Where these are not installed: a name that stands for None in sys.modules is not found.
ABSENT = "import sys; sys.modules.update(dict.fromkeys(['tensorflow', 'datasets', 'grain', 'keras_hub']))"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    return step


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def table_of(*arguments: str, **environment: str) -> dict[str, Any]:
    """What benchmarks/gpu.py prints of one row."""
    arguments = (*arguments, "--seconds=280")
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A row measured where TensorFlow and datasets are absent."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "sitecustomize.py").write_text(ABSENT)
    environment = {"PYTHONPATH": str(folder)}
    there = [sys.executable, "-c", "import tensorflow"]
    found = subprocess.run(there, env={**os.environ, **environment}, capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr
    return table_of(f"--case={PRESET}", **environment)


@pytest.mark.heavy
def test_a_row_has_what_the_table_shows(row):
    assert "error" not in row, row
    assert row["name"] == PRESET
    for name in ("tokens_per_second", "step_ms", "peak_gib", "first_step_s", "ceiling_tflops", "floor_ms"):
        assert row[name] > 0, name
    assert row["peak_of"] == "process (resident set)"  # XLA's CPU device reports no memory
    assert row["first_step_s"] >= row["compile_s"]
    assert row["versions"].keys() == {"keras_gemma_ft", "jax", "keras"}
    assert {"device", "date", "trainable_parameters", "step_gib", "state_gib"} <= row.keys()
    assert row["tokens_per_second"] == pytest.approx(ROWS * LENGTH / row["step_ms"] * 1000, rel=0.02)
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"], rel=0.02, abs=1e-3)


@pytest.mark.heavy
def test_a_row_is_of_steps_that_train(row):
    first, second, third = row["losses"]
    assert third < second < first


@pytest.mark.heavy
def test_the_floor_of_a_row_is_that_counted_by_hand(row):
    # Hidden size 160, FFN 320, per-layer width 32; 4 heads of 32 in local layers and of 64 in global ones,
    # which alternate, with 1 of keys and values. Layers 4 and 5 share K/V and have an FFN of 640.
    ffn, per_layer = 3 * 160 * (4 * 320 + 2 * 640), 6 * 2 * 160 * 32 + 160 * 6 * 32
    queries, keys = 3 * 2 * 160 * 4 * (32 + 64), 2 * 2 * 160 * (32 + 64)
    flops = 4 * (ffn + per_layer + queries + keys + 4096 * 160) * ROWS * LENGTH
    # Both figures are rounded.
    assert row["floor_ms"] == pytest.approx(flops / row["ceiling_tflops"] / 1e9, rel=0.01, abs=0.005)


def test_the_floor_of_tiny_is_that_counted_by_hand(step):
    # Hidden size 64, FFN 128, per-layer width 64; 8 heads of 16 in local layers and of 32 in global ones,
    # with 2 of keys and values. Layers 0 to 2 have K/V of their own, 3 to 5 share it; 2 and 5 are global.
    every = 3 * 64 * 128 + 2 * 64 * 64
    local, global_ = every + 2 * 64 * 8 * 16, every + 2 * 64 * 8 * 32
    own_kv = 2 * (2 * 64 * 2 * 16) + 2 * 64 * 2 * 32
    matrices = 4 * local + 2 * global_ + own_kv + 64 * 6 * 64
    assert floor_flops(step.decoder("tiny"), 10) == 4 * (matrices + 512 * 64) * 10


def test_the_floor_counts_the_experts_that_a_token_visits(step):
    heads = 25 * (2 * 16 + 2 * 8) * 256 + 5 * (2 * 16 + 2) * 512  # global layers have no values of their own
    wide = 3 * 30 * (2112 + 8 * 704)
    assert floor_flops(step.decoder("26b_a4b"), 1) == 4 * 2816 * (heads + wide + 262_144)
    assert floor_flops(step.decoder("26b_a4b"), 10, all_weights=True) == 60 * 2816 * (heads + wide + 262_144)


def test_every_row_of_the_table_is_a_case(step, gpu):
    fields = {field.name for field in dataclasses.fields(Settings)}
    for name, case in gpu.CASES.items():
        given = step.arguments(shlex.split(case))
        assert given.model == name.split()[0].replace("-", "_")
        assert given.method == name.split()[1]
        assert given.rows % (given.micro_batch or given.rows) == 0
        assert given.settings.keys() <= fields


def test_quantization_is_spelled_by_part(step):
    case = step.arguments(["--model=tiny", "--method=qlora", "--quantization=embedding=int8"])
    assert case.quantization == {"weights": "nf4", "embedding": "int8"}
    assert step.arguments(["--model=tiny", "--method=qlora"]).quantization == {"weights": "nf4"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "one of the arguments --model --preset is required"),
        (["--model=tiny", "--quantization=nf4"], "--quantization goes with --method=qlora"),
        (["--model=tiny", "--micro-batch=0"], "--micro-batch must be positive, not 0"),
    ],
)
def test_what_is_no_case_is_refused(step, capsys, given, message):
    with pytest.raises(SystemExit, match="2"):
        step.arguments(given)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("print('note'); print('{\"a\": 1}')", {"a": 1}),
        ("class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory. Tried')",
         {"error": "out of memory"}),
        ("class JaxRuntimeError(Exception): pass\nraise JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')",
         {"error": "out of memory"}),
        ("import sys; print('W: ran out of memory, trying again', file=sys.stderr); sys.exit('other')",
         {"error": "W: ran out of memory, trying again | other"}),
        ("import time; time.sleep(60)", {"error": "took longer than 1 s"}),
        ("import os; os.kill(os.getpid(), 9)", {"error": "ended with status -9"}),
    ],
)  # fmt: skip
def test_a_process_that_fails_is_a_result(gpu, tmp_path, source, result):
    program = tmp_path / "program.py"
    program.write_text(source)
    assert gpu.run_apart(program, [], 1 if "sleep" in source else 30) == result


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_peft_makes_the_same_step(method):
    row = table_of(f"--case={RANDOM} --method={method}", "--vs-peft")
    theirs = row["peft"]
    assert "error" not in row, row
    assert "error" not in theirs, theirs
    assert theirs["trainable_parameters"] == row["trainable_parameters"]
    for losses in (row["losses"], theirs["losses"]):
        assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    # Weights are random on both sides, with the same spread: the first losses are all but ln 512.
    assert theirs["losses"][0] == pytest.approx(row["losses"][0], abs=0.05)
    expected = row["tokens_per_second"] / theirs["tokens_per_second"]
    assert row["ours_to_peft"]["tokens_per_second"] == pytest.approx(expected, rel=1e-3)
    assert row["ours_to_peft"].keys() == {"tokens_per_second", "peak_gib"}


@pytest.mark.heavy
def test_a_second_process_finds_the_program_in_the_cache():
    row = table_of(f"--case={RANDOM}", "--warm")
    assert row["compile_cached"] is False
    assert row["warm"]["compile_cached"] is True
    assert row["warm"]["first_step_s"] < row["first_step_s"]
