"""`GemmaCausalLM.export_to_transformers` and `.export_to_peft`."""

import numpy as np
import pytest
from test_hf import relative_error, transformers_logits
from test_peft import peft_logits, peft_model

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.loading import open_source
from keras_gemma_ft.model.weights import table

TOKENS = np.random.default_rng(0).integers(4, 300, (2, 24), np.int32)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def change(model: GemmaCausalLM) -> None:
    """Stands for training."""
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        value = np.array(variable.value, np.float32)
        variable.assign(value + random.normal(0, 0.1, variable.shape).astype(np.float32))


def test_adapters_both_ways_and_back(preset, tmp_path):
    model = GemmaCausalLM.from_preset(str(preset("e2b")), dtype="float32")
    model.enable_lora(4, dropout=0.1)
    change(model)
    logits = np.asarray(model.logits(TOKENS))
    model.export_to_transformers(tmp_path / "hf")
    model.export_to_peft(tmp_path / "peft")
    assert relative_error(transformers_logits(tmp_path / "hf", TOKENS), logits) < 1e-4
    assert relative_error(peft_logits(peft_model(preset("e2b"), tmp_path / "peft"), TOKENS), logits) < 1e-4

    again = GemmaCausalLM.from_preset(str(tmp_path / "hf"), dtype="float32")
    assert again.config == model.config
    assert relative_error(np.asarray(again.logits(TOKENS)), logits) < 1e-4
    assert again.tokenizer.encode("the thing") == model.tokenizer.encode("the thing")
    assert again.tokenizer.stop_ids == model.tokenizer.stop_ids


def test_all_weights(preset, tmp_path):
    model = GemmaCausalLM.from_preset(str(preset("31b")), dtype="float32")
    change(model)
    model.export_to_transformers(tmp_path / "hf")
    logits = np.asarray(model.logits(TOKENS))
    assert relative_error(transformers_logits(tmp_path / "hf", TOKENS), logits) < 1e-4


def test_a_quantized_model_is_merged_into_what_was_published(preset, tmp_path):
    model = GemmaCausalLM.from_preset(
        str(preset("31b")), quantization={"weights": "int8", "embedding": "int8"}, dtype="float32"
    )
    model.enable_lora(4)
    model.export_to_transformers(tmp_path / "hf")  # adapters that change nothing yet
    published, exported = open_source(preset("31b")), open_source(tmp_path / "hf")
    for weight in table(model.config).values():
        for index, _ in weight.hf_names():
            np.testing.assert_array_equal(exported.part(weight, index), published.part(weight, index))


def test_a_model_from_no_preset(preset, tmp_path):
    config = open_source(preset("31b")).config
    model = GemmaCausalLM(config, dtype="float32", seed=3)
    model.enable_lora(2)
    change(model)
    model.export_to_transformers(tmp_path / "hf")
    logits = np.asarray(model.logits(TOKENS))
    assert relative_error(transformers_logits(tmp_path / "hf", TOKENS), logits) < 1e-4
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "certificate.json",
        "config.json",
        "model.safetensors",
    }
    with pytest.raises(UserError, match="came from no preset"):
        model.export_to_peft(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
