"""What importing costs, and what Keras may run on, each in a process of its own."""

import os
import subprocess
import sys

import pytest

import keras_gemma_ft
from keras_gemma_ft import compilation

HEAVY = "{'jax', 'keras', 'keras_hub', 'numpy', 'tensorflow', 'torch', 'transformers'}"


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("KERAS_BACKEND", compilation.JAX_CACHE)  # which this process set when it imported the package
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def printed(script: str, **environment: str) -> str:
    result = python(script, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_package_alone_imports_nothing_heavy():
    assert printed(f"import sys, keras_gemma_ft; print(sorted({HEAVY} & sys.modules.keys()))") == "[]"


def test_tensorflow_is_not_imported_before_it_is_needed():
    modules = [
        "data",
        "model.causal_lm",
        "train.optimizers",
        "train.run",
        "evaluate.run",
        "export.run",
        "cli",
    ]
    script = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(f"keras_gemma_ft.{{name}}")
    print(name, sorted({{'tensorflow', 'keras_hub'}} & sys.modules.keys()))
"""
    assert printed(script).splitlines() == [f"{name} []" for name in modules]


def test_the_first_use_of_a_name_prepares_jax():
    script = """
import os, keras_gemma_ft
before = os.environ.get("XLA_FLAGS", "")
keras_gemma_ft.GemmaCausalLM
import jax
print([before, os.environ["XLA_FLAGS"], jax.config.jax_compilation_cache_dir])
"""
    expected = ["", " ".join(compilation.FLAGS), "/nowhere/compiled"]
    assert printed(script, XLA_FLAGS="", KERAS_GEMMA_FT_CACHE="/nowhere/compiled") == str(expected)


@pytest.mark.parametrize("name", keras_gemma_ft.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(keras_gemma_ft)
    assert getattr(keras_gemma_ft, name) is getattr(keras_gemma_ft, name)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Gemma'"):
        keras_gemma_ft.Gemma  # noqa: B018


def test_keras_runs_on_jax_where_nothing_is_said():
    assert printed("import keras_gemma_ft, keras; print(keras.config.backend())") == "jax"
    script = "import keras_gemma_ft, os; print(os.environ['KERAS_BACKEND'])"
    assert printed(script, KERAS_BACKEND="") == "jax"


@pytest.mark.parametrize("use", ["keras_gemma_ft.GemmaCausalLM", "keras_gemma_ft.optimizers"])
def test_another_backend_is_refused_with_the_remedy(use):
    result = python(f"import keras_gemma_ft; {use}", KERAS_BACKEND="numpy")
    assert result.returncode == 1
    assert "UserError: KERAS_BACKEND: keras_gemma_ft needs Keras on JAX, not on numpy" in result.stderr
    assert "set the environment variable KERAS_BACKEND to jax, or unset it." in result.stderr


def test_the_command_line_refuses_another_backend_without_a_traceback():
    script = "from keras_gemma_ft.cli import main; raise SystemExit(main(['train']))"
    result = python(script, KERAS_BACKEND="numpy")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "keras-gemma-ft: KERAS_BACKEND: keras_gemma_ft needs Keras on JAX, not on numpy",
        "  set the environment variable KERAS_BACKEND to jax, or unset it.",
    ]


def test_keras_imported_first_on_another_backend_is_refused():
    script = """
import os; os.environ["KERAS_BACKEND"] = "numpy"
import keras; del os.environ["KERAS_BACKEND"]
import keras_gemma_ft; keras_gemma_ft.GemmaCausalLM
"""
    result = python(script)
    assert "needs Keras on JAX, not on numpy" in result.stderr
    assert "import keras_gemma_ft before keras" in result.stderr
