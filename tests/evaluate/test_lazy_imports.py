"""Metric and plot libraries are loaded when they are used, and not before."""

import subprocess
import sys


def test_importing_the_evaluation_loads_no_heavy_library():
    code = (
        "import sys, keras_gemma_ft.evaluate, keras_gemma_ft.evaluate.report, keras_gemma_ft.evaluate.human, "
        "keras_gemma_ft.train.overfitting, keras_gemma_ft.train.sweep, keras_gemma_ft.evaluate.next_steps, "
        "keras_gemma_ft.train.audit; "
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'sacrebleu', 'rouge_score', 'jsonschema', 'rich', "
        "'jinja2', 'tensorflow', 'keras_hub', 'torch'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
