"""Configurations in every spelling there is: published, transformers' own, KerasHub's, ours."""

import json

import pytest
from small_models import GLOBAL, KINDS, LOCAL

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.config import Gemma4Config

# As transformers numbers layers: with zeros in front from ten layers on.
LONG = {**KINDS["31b"], "layer_types": [LOCAL, LOCAL, GLOBAL] * 4, "num_hidden_layers": 12}
BY_LAYER = {f"{index:02}": {"head_dim": 16, "num_key_value_heads": 1} for index in (2, 5, 8, 11)}


def spelled_by_layer(config: dict, overrides: dict) -> dict:
    by_layer = {**config, "per_layer_config": overrides}
    del by_layer["global_head_dim"], by_layer["num_global_key_value_heads"]
    return by_layer


@pytest.mark.parametrize("whole", [False, True], ids=["text", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_published_configs_as_transformers_writes_them(shared, tmp_path, kind, whole):
    import transformers

    published = json.loads((shared / "model_configs" / f"{kind}.json").read_text())
    text = {name: value for name, value in published.items() if name not in ("_meta", "dtype")}
    if whole:
        transformers.Gemma4Config(text_config=text).save_pretrained(tmp_path)
    else:
        transformers.Gemma4TextConfig(**text).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "global_head_dim" not in json.dumps(written)  # it is the other spelling indeed
    expected = Gemma4Config.from_hf(published)
    assert (expected.head_dim, expected.global_head_dim) == (256, 512)
    assert Gemma4Config.from_hf(written) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_ours_reads_back(kind):
    config = Gemma4Config.from_hf(KINDS[kind])
    assert Gemma4Config.from_hf(config.to_hf()) == config
    assert Gemma4Config.from_hf({"model_type": "gemma4", "text_config": config.to_hf()}) == config


@pytest.mark.parametrize("kind", KINDS)
def test_published_values_are_read(shared, kind):
    published = json.loads((shared / "model_configs" / f"{kind}.json").read_text())
    config = Gemma4Config.from_hf(published)
    of_global, of_local = config.kind("own", "global"), config.kind("own", "local")
    assert (of_global.head_dim, of_local.head_dim) == (512, 256)
    assert (of_global.rope_theta, of_local.rope_theta) == (1e6, 1e4)
    assert (of_global.rotary_fraction, of_local.rotary_fraction) == (0.25, 1.0)
    # FACTS: kv heads local / global; layers a period; layers that compute K/V.
    kv, period, own = {
        "e2b": ((1, 1), 5, 15),
        "e4b": ((2, 2), 6, 24),
        "26b_a4b": ((8, 2), 6, 30),
        "31b": ((16, 4), 6, 60),
    }[kind]
    assert (of_local.num_kv_heads, of_global.num_kv_heads) == kv
    assert of_global.k_eq_v == (kind in ("26b_a4b", "31b"))
    assert config.stages[0].locals_per_group + 1 == period
    assert config.num_hidden_layers - config.num_kv_shared_layers == own


def test_layer_numbers_with_zeros_in_front():
    assert Gemma4Config.from_hf(spelled_by_layer(LONG, BY_LAYER)) == Gemma4Config.from_hf(LONG)


def test_layers_set_apart_one_by_one_are_refused():
    one_less = {number: override for number, override in BY_LAYER.items() if number != "08"}
    with pytest.raises(UserError, match="per_layer_config: layers of one kind differ"):
        Gemma4Config.from_hf(spelled_by_layer(LONG, one_less))
    one_more = {**BY_LAYER, "01": {"head_dim": 4}}
    with pytest.raises(UserError, match="per_layer_config: layers of one kind differ"):
        Gemma4Config.from_hf(spelled_by_layer(LONG, one_more))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text', not a Gemma 4"),
        ({"use_bidirectional_attention": "all"}, "it is no causal model"),
        ({"layer_types": [LOCAL, GLOBAL, LOCAL] * 2}, "no equal groups that end in a full layer"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
    ],
)
def test_what_is_no_decoder_of_ours_is_refused(change, complaint):
    config = {name: value for name, value in (KINDS["e4b"] | change).items() if value is not None}
    if "layer_types" in change:
        config |= {"num_hidden_layers": 6, "num_kv_shared_layers": 0}
    with pytest.raises(UserError, match=complaint):
        Gemma4Config.from_hf(config)


@pytest.mark.parametrize("kind", KINDS)
def test_keras_hub_spelling_reads_back(kind):
    config = Gemma4Config.from_hf(KINDS[kind])
    read = Gemma4Config.from_keras_hub(config.to_keras_hub())
    # KerasHub does not say how long a text may be.
    assert read == Gemma4Config.from_hf({**KINDS[kind], "max_position_embeddings": 131_072})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_logit_soft_cap": 50.0}, "attention_logit_soft_cap=50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({"global_rope_scaling_factor": 8.0}, "global_rope_scaling_factor=8.0 is not supported"),
        ({"num_layers": None}, "'num_layers' is missing"),
    ],
)
def test_keras_hub_models_that_are_not_gemma_4_are_refused(change, complaint):
    config = Gemma4Config.from_hf(KINDS["e4b"]).to_keras_hub() | change
    config = {name: value for name, value in config.items() if name not in change or value is not None}
    with pytest.raises(UserError, match=complaint):
        Gemma4Config.from_keras_hub(config)
