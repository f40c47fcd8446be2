"""Faulty Hugging Face directories: what is missing, misshapen, strange or cut off is named."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.loading import HFSource

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def directory(hf_directory, tmp_path):
    return shutil.copytree(hf_directory("31b"), tmp_path / "checkpoint")


def change(directory, edit):
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(NORM), f"the weight {NORM} is missing"),
        (lambda w: w.update({NORM: torch.ones(3)}), rf"the weight {NORM} has shape \[3\], where config.json"),
        (lambda w: w.update({"model.extra": torch.ones(3)}), "the weight model.extra belongs to no part"),
        (lambda w: w.pop("model.embed_tokens.weight"), "holds no weight embed_tokens.weight"),
    ],
    ids=["missing", "misshapen", "strange", "no text decoder"],
)
def test_weights_that_do_not_fit(directory, edit, message):
    HFSource(directory)
    change(directory, edit)
    with pytest.raises(UserError, match=message):
        HFSource(directory)


def test_a_file_that_is_cut_off(directory):
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(UserError, match=r"safetensors: ends 1,000 bytes before its weights do\n.*again"):
        HFSource(directory)
    os.truncate(path, 20)
    with pytest.raises(UserError, match=r"the weights cannot be read \(no safetensors file\)"):
        HFSource(directory)


def test_a_shard_that_is_not_there(directory):
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"of-00002.safetensors: the weights cannot be read \(No such file"):
        HFSource(directory)


@pytest.mark.parametrize("header", [b"", b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": []}}'])
def test_a_file_that_is_no_safetensors(directory, header):
    content = len(header).to_bytes(8, "little") + header + bytes(8) if header else b""
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"the weights cannot be read \(no safetensors file\)"):
        HFSource(directory)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}'])
def test_an_index_without_shards(directory, index):
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index.json: holds no weight_map"):
        HFSource(directory)
