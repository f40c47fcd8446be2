"""Merged directories, loaded by transformers and by us."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from small_models import KINDS
from tuning import LORA, adapters, tuned

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.certificate import token_rows
from keras_gemma_ft.export.hf import export_hf
from keras_gemma_ft.export.preset import Preset
from keras_gemma_ft.export.staging import CERTIFICATE
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model import streaming
from keras_gemma_ft.model.loading import open_source
from keras_gemma_ft.model.weights import table


def transformers_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.max(np.abs(ours - reference)) / np.max(np.abs(reference)))


def adapted_logits(model: Tuned) -> np.ndarray:
    return streaming.logits(model.unmerged, token_rows(model), model.adapters, model.scale)


def nothing(directory: Path) -> None:
    """A model without tokenizer files."""


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_base_and_adapters_do(preset, tmp_path, kind):
    model = tuned(preset(kind))
    export_hf(tmp_path / "hf", model, nothing)
    tokens = token_rows(model)
    expected = adapted_logits(model)
    assert relative_error(transformers_logits(tmp_path / "hf", tokens), expected) < 1e-4
    # The comparison would notice a missing adapter.
    assert relative_error(transformers_logits(preset(kind), tokens), expected) > 1e-2


def test_shards_hold_the_same(preset, tmp_path):
    model = tuned(preset("31b"))
    export_hf(tmp_path / "one", model, nothing)
    export_hf(tmp_path / "many", model, nothing, max_shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    tokens = token_rows(model)
    one, many = (transformers_logits(tmp_path / name, tokens) for name in ("one", "many"))
    np.testing.assert_array_equal(one, many)


def test_bfloat16_is_the_rounded_merge(preset, tmp_path):
    model = tuned(preset("31b"))
    certificate = export_hf(tmp_path / "hf", model, nothing, dtype="bfloat16")
    exported = open_source(tmp_path / "hf")
    assert exported.dtype == "bfloat16"
    for weight in table(model.config).values():
        for index, _ in weight.hf_names():
            expected = model.part(weight, index).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(exported.part(weight, index), expected)
    parity = certificate["parity"]
    assert parity["merged_and_adapted"]["max_relative_error"] < 1e-4
    stored = parity["stored_and_adapted"]["median_relative_error"]
    assert 1e-4 < stored < parity["base_and_adapted"]["median_relative_error"]


def test_the_dtype_is_the_bases_unless_told(preset, tmp_path):
    export_hf(tmp_path / "bfloat16", tuned(preset("31b")), nothing, dtype="bfloat16")
    again = Tuned(open_source(tmp_path / "bfloat16"), adapters(preset("31b")), LORA)
    export_hf(tmp_path / "again", again, nothing)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"
    assert open_source(tmp_path / "again").dtype == "bfloat16"


def test_all_weights_trained(preset, tmp_path):
    base = open_source(preset("e2b"))
    random = np.random.default_rng(3)
    trained = {
        name: random.normal(1.0 if weight.use == "small" else 0.0, 0.2, weight.stacked_shape).astype(
            np.float32
        )
        for name, weight in table(base.config).items()
    }
    model = Tuned(base, trained, None)
    certificate = export_hf(tmp_path / "hf", model, nothing)
    ours = streaming.logits(model, token_rows(model))
    assert relative_error(transformers_logits(tmp_path / "hf", token_rows(model)), ours) < 1e-4
    assert certificate["parity"]["base_and_adapted"]["max_relative_error"] > 1e-2


def test_weights_that_were_not_trained_stay(preset, tmp_path):
    base = open_source(preset("e2b"))
    norm = np.full(base.config.hidden_size, 0.5, np.float32)
    export_hf(tmp_path / "hf", Tuned(base, {"norm": norm}, None), nothing)
    exported = open_source(tmp_path / "hf")
    for name, weight in table(base.config).items():
        for index, _ in weight.hf_names():
            expected = norm if name == "norm" else base.part(weight, index)
            np.testing.assert_array_equal(exported.part(weight, index), expected)


@pytest.mark.parametrize("kind", ["e2b", "31b"])
def test_the_tokenizer_comes_along(preset, tmp_path, kind):
    from transformers import AutoTokenizer, GenerationConfig

    model = tuned(preset(kind))
    known = Preset(str(preset(kind)))
    export_hf(tmp_path / "hf", model, lambda directory: known.write_tokenizer(directory, model.config))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "sing"}], add_generation_prompt=True, tokenize=False
    )
    thought = "<|channel>thought\n<channel|>" if model.config.variant == "large" else ""
    assert prompt == f"<bos><|turn>user\nsing<turn|>\n<|turn>model\n{thought}"
    stops = GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
    assert stops == loaded.convert_tokens_to_ids(["<eos>", "<turn|>", "<|tool_response>"])
    files = json.loads((tmp_path / "hf" / CERTIFICATE).read_text())["files"]
    assert {*files, CERTIFICATE} == {path.name for path in (tmp_path / "hf").iterdir()}


def test_an_exported_directory_is_a_base_again(preset, tmp_path):
    known = Preset(str(preset("e2b")))
    model = tuned(preset("e2b"))
    export_hf(tmp_path / "first", model, lambda directory: known.write_tokenizer(directory, model.config))
    first = Preset(str(tmp_path / "first"))
    again = Tuned(open_source(tmp_path / "first"), adapters(preset("e2b")), LORA)
    export_hf(tmp_path / "second", again, lambda directory: first.write_tokenizer(directory, model.config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert open_source(tmp_path / "second").config == model.config


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_exported(preset, tmp_path, value):
    trained = adapters(preset("e2b"))
    trained["own/local/q_proj/lora_b"][0, 0, 0, 0] = value
    model = Tuned(open_source(preset("e2b")), trained, LORA)
    with pytest.raises(UserError, match=r"q_proj\.weight holds NaN or infinity; nothing was exported"):
        export_hf(tmp_path / "hf", model, nothing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("own/local/q_proj/lora_a", (1, 2, 3, 4), r"has shape \[1, 2, 3, 4\]"),
        ("own/local/router/lora_a", (1,), "own/local/router/lora_a is no weight of it"),
        ("own/local/q_norm/lora_c", (1,), "own/local/q_norm/lora_c is no weight of it"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(preset, name, shape, complaint):
    with pytest.raises(UserError, match=complaint):
        Tuned(open_source(preset("31b")), {name: np.zeros(shape, np.float32)}, LORA)


def test_half_an_adapter_is_refused(preset):
    trained = adapters(preset("31b"))
    del trained["own/global/q_proj/lora_b"]
    with pytest.raises(UserError, match="own/global/q_proj has lora_a alone"):
        Tuned(open_source(preset("31b")), trained, LORA)
