"""Adapters, loaded by PEFT on transformers' models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import KINDS
from test_hf import adapted_logits, relative_error
from tuning import LORA, adapters, tuned

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.certificate import token_rows
from keras_gemma_ft.export.peft import export_peft
from keras_gemma_ft.export.preset import Preset
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model import streaming
from keras_gemma_ft.model.loading import open_source
from keras_gemma_ft.model.lora import LoraConfig

# PEFT 0.21 asks transformers 5.24 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def peft_model(base: Path, adapter: Path) -> Any:
    """The base as transformers' AutoModelForCausalLM makes it, with the adapter; nothing of it left out."""
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    )
    loaded = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        assert loaded == set(file.keys())
    return model.eval()


def peft_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_what_we_do(preset, tmp_path, kind):
    model = tuned(preset(kind))
    certificate = export_peft(tmp_path / "peft", model, str(preset(kind)))
    loaded = peft_model(preset(kind), tmp_path / "peft")
    settings = loaded.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 7.5, 0.05)
    tokens, expected = token_rows(model), adapted_logits(model)
    assert relative_error(peft_logits(loaded, tokens), expected) < 1e-4
    with loaded.disable_adapter():
        assert relative_error(peft_logits(loaded, tokens), expected) > 1e-2
    assert certificate["parity"]["merged_and_adapted"]["median_relative_error"] < 1e-5


def test_some_targets_alone(preset, tmp_path):
    some = LoraConfig(2, 4.0, 0.0, "q_proj,down_proj,per_layer_projection")
    model = tuned(preset("e4b"), some)
    export_peft(tmp_path / "peft", model, str(preset("e4b")))
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "down_proj", "per_layer_projection"]
    assert config["lora_alpha"] == 4
    logits = peft_logits(peft_model(preset("e4b"), tmp_path / "peft"), token_rows(model))
    assert relative_error(logits, adapted_logits(model)) < 1e-4


def test_an_adapter_on_a_whole_gemma_4_leaves_its_towers_alone(preset, whole, tmp_path):
    known = Preset(str(whole))
    assert known.is_whole
    assert not Preset(str(preset("e2b"))).is_whole
    source = open_source(whole)
    assert any("vision_tower" in name for name in source.ignored)
    model = Tuned(source, adapters(whole), LORA)
    certificate = export_peft(tmp_path / "peft", model, known.hf_name, whole=known.is_whole)
    loaded = peft_model(whole, tmp_path / "peft")
    assert type(loaded.base_model.model).__name__ == "Gemma4ForConditionalGeneration"
    adapted = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    assert not [name for name in adapted if "language_model" not in name]
    # Ids of images and sounds are looked up elsewhere in a whole model.
    tokens = np.where(token_rows(model) >= 360, 5, token_rows(model))
    expected = streaming.logits(model.unmerged, tokens, model.adapters, model.scale)
    assert relative_error(peft_logits(loaded, tokens), expected) < 1e-4
    assert certificate["weights"]["as_intended"]


def test_bare_names_would_hit_the_towers(whole):
    """Why a whole model needs a regular expression: PEFT adapts, or stumbles over, the towers otherwise."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(whole)
    try:
        model = get_peft_model(base, PeftConfig(target_modules=["q_proj", "down_proj"]))
    except ValueError as error:
        assert "not supported" in str(error)
    else:
        assert any("tower" in name for name, _ in model.named_parameters() if "lora_" in name)


def test_a_run_of_all_weights_has_no_adapter(preset, tmp_path):
    base = open_source(preset("31b"))
    model = Tuned(base, {"norm": np.ones(base.config.hidden_size, np.float32)}, None)
    with pytest.raises(UserError, match="there is no adapter"):
        export_peft(tmp_path / "peft", model, "base")
    assert not list(tmp_path.iterdir())


def test_adapters_of_experts_are_refused_and_merged_instead(preset, tmp_path):
    """As a merged directory they give the logits of the adapters beside their experts."""
    model = tuned(preset("26b_a4b"), LoraConfig(2, 4.0, 0.0, "q_proj,experts_gate_up,experts_down"))
    with pytest.raises(UserError, match="--format=hf, which merges them"):
        export_peft(tmp_path / "peft", model, "base")
    assert not list(tmp_path.iterdir())
    merged = streaming.logits(model, token_rows(model))
    assert relative_error(merged, adapted_logits(model)) < 1e-5
    without = tuned(preset("26b_a4b"), LoraConfig(2, 4.0, 0.0, "q_proj"))
    assert relative_error(adapted_logits(without), merged) > 1e-2
