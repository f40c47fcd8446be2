"""Compiling for a GPU that is not here: the model without weights, and what bad input is told.

The compiler for GPUs is no part of the project's own packages, so nothing is compiled here.
"""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compile_for

    return compile_for


@pytest.mark.parametrize(
    "case",
    ["--model=tiny", "--preset=gemma4_tiny", "--model=tiny --method=qlora --quantization=nf4,embedding=int8"],
)
def test_a_weightless_model_has_the_variables_of_a_real_one(compile_for, case):
    parsed = compile_for.step.arguments(case.split())
    found, hosted = compile_for.weightless(parsed)
    real = compile_for.step._model(parsed)
    assert not hosted

    def described(model):
        return [(v.path.partition("/")[2], v.shape, v.dtype) for v in model.variables]

    assert described(found) == described(real)


def test_what_belongs_on_the_host_is_told_apart(compile_for):
    case = "--model=tiny --quantization=per_layer_embedding=host"
    model, hosted = compile_for.weightless(compile_for.step.arguments(case.split()))
    on_host = [variable for variable in model.variables if id(variable.value) in hosted]
    assert [variable.path.rpartition("/")[2] for variable in on_host] == ["embed_tokens_per_layer"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_nothing_of_its_memory_is_touched():
    """E2B in bfloat16 is 8.7 GiB. What `getrusage` counts would begin with the memory of this process."""
    program = (
        "import compile_for as c; c.weightless(c.step.arguments(['--model=e2b']));"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1024 * int(done.stdout.split()[1]) < 2 * 2**30


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file or directory"), ("no description", "JAX makes no device of it")],
)
def test_a_target_that_is_none_is_refused(tmp_path, content, message):
    target = tmp_path / "gpu.txtpb"
    if content is not None:
        target.write_text(content)
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "compile_for.py", f"--target={target}", "--model=tiny"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"compile_for.py: --target={target}: {message}" in done.stderr
    assert "Traceback" not in done.stderr
