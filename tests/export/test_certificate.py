"""The certificate refuses what is not the tuned model, and then nothing is left."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import KINDS
from test_hf import nothing
from tuning import LORA, adapters, tuned

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export import certificate, hf, peft
from keras_gemma_ft.export.staging import CERTIFICATE
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model import streaming
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.loading import open_source


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_are_the_models(preset, kind):
    model = GemmaCausalLM.from_preset(str(preset(kind)), dtype="float32")
    model.enable_lora(LORA.rank, LORA.alpha, LORA.dropout)
    random = tuned(preset(kind))
    for variable in model.trainable_variables:
        stem, _, factor = variable.path.removeprefix(f"{model.name}/").rpartition("/")
        variable.assign(random.adapters[stem][factor])
    tokens = certificate.token_rows(random)
    ours = streaming.logits(random.unmerged, tokens, random.adapters, random.scale)
    expected = np.asarray(model.logits(tokens))
    assert np.max(np.abs(ours - expected)) < 1e-4 * np.max(np.abs(expected))


def test_what_it_says(preset, tmp_path):
    model = tuned(preset("31b"))
    hf.export_hf(tmp_path / "hf", model, nothing, {"base": {"preset": "31b"}})
    says = json.loads((tmp_path / "hf" / CERTIFICATE).read_text())
    assert (says["format"], says["dtype"], says["base"]) == ("hf", "float32", {"preset": "31b"})
    # Seven projections in each of four local layers, six in each of two whose values are their keys.
    tensors = len(load_file(tmp_path / "hf" / "model.safetensors"))
    assert says["weights"] == {"compared": tensors, "merged": 4 * 7 + 2 * 6, "as_intended": True}
    parity = says["parity"]
    assert parity["merged_and_adapted"]["argmax_agreement"] == 1.0
    assert parity["merged_and_adapted"]["median_relative_error"] < 1e-5
    assert parity["base_and_adapted"]["median_relative_error"] > 1e-2
    assert set(says["files"]) == {"config.json", "model.safetensors"}
    assert says["files"]["model.safetensors"]["bytes"] == (tmp_path / "hf/model.safetensors").stat().st_size
    assert len(says["files"]["config.json"]["sha256"]) == 64
    assert {"keras_gemma_ft", "jax", "numpy", "python"} == set(says["versions"])


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.weight", "norm.weight", "layers.2.layer_scalar"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_value_is_found(preset, tmp_path, name, dtype):
    model = tuned(preset("31b"))
    hf.export_hf(tmp_path / "hf", model, nothing, dtype=dtype)
    path = tmp_path / "hf" / "model.safetensors"
    arrays = load_file(path)
    value = arrays[f"model.{name}"].copy()
    # The largest value becomes the second next that its type has. Merged in float32, it may be off by 1e-6.
    place = int(np.argmax(np.abs(value)))
    bits = value.reshape(-1)[place : place + 1].view({"float32": np.int32, "bfloat16": np.int16}[dtype])
    bits += 32 if dtype == "float32" and "q_proj" in name else 2
    save_file({**arrays, f"model.{name}": value}, path)
    with pytest.raises(UserError, match="is not what was to be written"):
        certificate.compare_weights(open_source(tmp_path / "hf"), model)


def test_a_broken_writer_leaves_nothing(preset, tmp_path, monkeypatch):
    write = hf.write_sharded

    def careless(directory, specs, load, limit):
        return write(directory, specs, lambda spec: load(spec) * 1.01, limit)

    monkeypatch.setattr(hf, "write_sharded", careless)
    with pytest.raises(UserError, match="parity certificate"):
        hf.export_hf(tmp_path / "hf", tuned(preset("31b")), nothing)
    assert not list(tmp_path.iterdir())


def test_a_wrong_scale_in_the_adapters_configuration_is_found(preset, tmp_path, monkeypatch):
    right = peft.adapter_config
    monkeypatch.setattr(peft, "adapter_config", lambda *given: right(*given) | {"lora_alpha": 7})
    with pytest.raises(UserError, match="merged and adapted logits differ by"):
        peft.export_peft(tmp_path / "peft", tuned(preset("31b")), "base")
    assert not list(tmp_path.iterdir())


def test_factors_in_each_others_place_are_found(preset, tmp_path, monkeypatch):
    def swapped(model, prefix):
        names = list(right(model, prefix).items())
        shapes = {}
        for name, value in names:
            shapes.setdefault(value.shape, []).append(name)
        first, second = next(same for same in shapes.values() if len(same) > 1)[:2]
        arrays = dict(names)
        return arrays | {first: arrays[second], second: arrays[first]}

    right = peft._named
    monkeypatch.setattr(peft, "_named", swapped)
    with pytest.raises(UserError, match="is not what was to be written"):
        peft.export_peft(tmp_path / "peft", tuned(preset("31b")), "base")
    assert not list(tmp_path.iterdir())


def test_a_merge_that_is_not_the_adapters_is_refused(preset, tmp_path, monkeypatch):
    model = tuned(preset("31b"))
    # What is merged and what is written agree with each other, but not with the adapters.
    monkeypatch.setattr(
        model,
        "part",
        Tuned(
            model.base,
            {name: value * np.float32(0.99) for name, value in adapters(preset("31b")).items()},
            LORA,
        ).part,
    )
    with pytest.raises(UserError, match="merged and adapted logits differ by"):
        hf.export_hf(tmp_path / "hf", model, nothing)
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_finite_are_the_users_to_change(preset, tmp_path):
    trained = adapters(preset("31b"))
    # Each weight is finite, and their product overflows.
    trained["own/local/down_proj/lora_b"][:] = 1e38
    model = Tuned(open_source(preset("31b")), trained, LORA)
    with pytest.raises(UserError, match=r"not finite|NaN or infinity"), np.errstate(all="ignore"):
        peft.export_peft(tmp_path / "peft", model, "base")
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_survives_a_refused_one(preset, tmp_path, monkeypatch):
    model = tuned(preset("31b"))
    hf.export_hf(tmp_path / "hf", model, nothing)
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    monkeypatch.setattr(certificate, "LIMIT", -math.inf)
    with pytest.raises(UserError, match="merged and adapted"):
        hf.export_hf(tmp_path / "hf", model, nothing)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
