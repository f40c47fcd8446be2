"""GGUF by llama.cpp's own converter, read back by us and, where llama-cpp-python is there, run by it.

Needs a checkout of llama.cpp, named by the environment variable LLAMA_CPP, and its Python requirements.
"""

import json
import os
import shutil

import numpy as np
import pytest
from test_hf import relative_error
from tuning import LORA, adapters

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export import gguf
from keras_gemma_ft.export.certificate import token_rows
from keras_gemma_ft.export.gguf import export_gguf
from keras_gemma_ft.export.preset import Preset
from keras_gemma_ft.export.staging import CERTIFICATE
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model import streaming
from keras_gemma_ft.model.loading import open_source

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs LLAMA_CPP, a checkout of llama.cpp"),
]


def export(target, output_type):
    preset = Preset("gemma4_tiny")
    model = Tuned(open_source(preset.directory), adapters(preset.directory), LORA)
    certificate = export_gguf(
        target,
        model,
        lambda directory: preset.write_tokenizer(directory, model.config),
        gguf.find_converter(),
        output_type,
    )
    return model, certificate


@pytest.mark.parametrize(
    ("output_type", "stored"), [("f32", "f32"), ("bf16", "bf16"), ("auto", "bf16"), ("q8_0", "q8_0")]
)
def test_the_file_holds_the_merged_weights(tmp_path, output_type, stored):
    _, certificate = export(tmp_path / "gguf", output_type)
    assert certificate["dtype"] == stored
    merged, rounded, base = (
        certificate["parity"][name]["median_relative_error"]
        for name in ("merged_and_adapted", "stored_and_adapted", "base_and_adapted")
    )
    # What is merged is rounded to the preset's bfloat16 in any case.
    assert merged < 1e-5 < 1e-4 < rounded < base / 4
    files = json.loads((tmp_path / "gguf" / CERTIFICATE).read_text())["files"]
    assert {*files, CERTIFICATE} == {"model.gguf", CERTIFICATE}
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"model.gguf", CERTIFICATE}


def test_a_file_of_another_model_is_refused(tmp_path, monkeypatch):
    convert = gguf.convert

    def careless(hf, outfile, converter, output_type):
        """Converts a copy in which the last bit of the weights is another."""
        changed = hf.with_name("changed")
        shutil.copytree(hf, changed)
        content = bytearray((changed / "model.safetensors").read_bytes())
        content[-2] ^= 1
        (changed / "model.safetensors").write_bytes(content)
        convert(changed, outfile, converter, output_type)

    monkeypatch.setattr(gguf, "convert", careless)
    with pytest.raises(UserError, match="is not what was to be written"):
        export(tmp_path / "gguf", "f32")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_llama_cpp_computes_what_we_do(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    model, _ = export(tmp_path / "gguf", "f32")
    llama = llama_cpp.Llama(str(tmp_path / "gguf" / "model.gguf"), logits_all=True, n_ctx=64, verbose=False)
    rows = token_rows(model)
    found = []
    for row in rows:
        llama.reset()
        llama.eval(row.tolist())
        found.append(np.array(llama.scores[: len(row)]))
    stored = gguf.GgufSource(tmp_path / "gguf" / "model.gguf", model.config, gguf.find_converter())
    assert relative_error(np.stack(found), streaming.logits(stored, rows)) < 1e-3
