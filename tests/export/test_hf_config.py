"""config.json as we write it, against the published one and in transformers."""

import json

import pytest

from keras_gemma_ft.model.config import Gemma4Config

KINDS = ["e2b", "e4b", "31b", "26b_a4b"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_published_field_is_there(shared, kind):
    published = json.loads((shared / "model_configs" / f"{kind}.json").read_text())
    ours = Gemma4Config.from_hf(published).to_hf()
    silent = {"_meta", "dtype", "use_bidirectional_attention"}  # the last concerns images alone
    absent_when_dense = {"num_experts", "top_k_experts", "moe_intermediate_size"}
    for field, value in published.items():
        if field in absent_when_dense and not published["enable_moe_block"]:
            assert field not in ours  # llama.cpp takes any of them for a mixture of experts
        elif field not in silent:
            assert ours[field] == value, field
    assert (ours["architectures"], ours["model_type"]) == (["Gemma4ForCausalLM"], "gemma4_text")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_builds_the_same_model_from_it(preset, tmp_path, kind):
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(preset(kind))
    config = Gemma4Config.from_hf(json.loads((preset(kind) / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf() | {"dtype": "float32"}))
    (tmp_path / "model.safetensors").symlink_to(preset(kind) / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "Gemma4ForCausalLM"
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, reference(tokens).logits)
