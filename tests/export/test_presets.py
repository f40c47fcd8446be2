"""Exports of models from presets that are no text-only Hugging Face directory with every file."""

import json

import pytest
from test_hf import adapted_logits, relative_error, transformers_logits
from tuning import LORA, adapters, tuned

from keras_gemma_ft.export.certificate import token_rows
from keras_gemma_ft.export.hf import export_hf
from keras_gemma_ft.export.peft import adapter_config
from keras_gemma_ft.export.preset import Preset
from keras_gemma_ft.export.tokenizer import write_tokenizer
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model.loading import open_source
from keras_gemma_ft.model.weights import TEXT_PREFIX


def export(target, preset, model):
    return export_hf(target, model, lambda directory: preset.write_tokenizer(directory, model.config))


# Keras's own conversion of a bfloat16 or float32 array to numpy, while it saves.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_a_keras_hub_preset(preset, small_model, tmp_path):
    from keras_gemma_ft.model.keras_hub import to_keras_hub

    theirs = tmp_path / "keras_hub"
    source = open_source(preset("31b"))
    to_keras_hub(source.config, source.part, dtype="float32").save_to_preset(str(theirs))
    (theirs / "assets" / "tokenizer").mkdir(parents=True)
    (theirs / "assets" / "tokenizer" / "vocabulary.spm").write_bytes(small_model)
    (theirs / "tokenizer.json").write_text('{"class_name": "Gemma4Tokenizer"}')  # a Keras configuration

    known = Preset(str(theirs))
    assert known.is_keras_hub
    assert not known.is_whole
    model = Tuned(open_source(theirs), adapters(preset("31b")), LORA)
    export(tmp_path / "hf", known, model)
    logits = transformers_logits(tmp_path / "hf", token_rows(model))
    assert relative_error(logits, adapted_logits(tuned(preset("31b")))) < 1e-4
    made = tmp_path / "made"
    made.mkdir()
    write_tokenizer(made, small_model, "large", model.config.max_position_embeddings)
    for path in made.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_towers_are_left_out(preset, whole, tmp_path):
    model = Tuned(open_source(whole), adapters(whole), LORA)
    export(tmp_path / "hf", Preset(str(whole)), model)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Gemma4ForCausalLM"], "gemma4_text")
    logits = transformers_logits(tmp_path / "hf", token_rows(model))
    assert relative_error(logits, adapted_logits(tuned(preset("e2b")))) < 1e-4


@pytest.mark.parametrize(
    "missing", ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"]
)
def test_what_a_preset_lacks_is_made_and_the_rest_copied(preset, small_model, tmp_path, missing):
    complete, theirs, target = (tmp_path / name for name in ("complete", "theirs", "target"))
    for directory in (complete, theirs, target):
        directory.mkdir()
    write_tokenizer(complete, small_model, "edge", 256)
    for path in complete.iterdir():
        if path.name != missing:
            # Theirs are written otherwise, so that copies can be told.
            content = path.read_bytes()
            (theirs / path.name).write_bytes(content if path.suffix == ".jinja" else content + b"\n")
    (theirs / "config.json").write_text("{}")
    Preset(str(theirs)).write_tokenizer(target, open_source(preset("e2b")).config)
    for path in complete.iterdir():
        expected = path if path.name == missing else theirs / path.name
        assert (target / path.name).read_bytes() == expected.read_bytes(), path.name


def test_stop_tokens_that_a_preset_lacks_are_added(preset, small_model, tmp_path):
    theirs, target = tmp_path / "theirs", tmp_path / "target"
    theirs.mkdir()
    target.mkdir()
    write_tokenizer(theirs, small_model, "edge", 256)
    complete = json.loads((theirs / "generation_config.json").read_text())
    (theirs / "generation_config.json").write_text('{"eos_token_id": 1, "top_k": 7}')
    (theirs / "config.json").write_text("{}")
    Preset(str(theirs)).write_tokenizer(target, open_source(preset("e2b")).config)
    found = json.loads((target / "generation_config.json").read_text())
    assert found == {"eos_token_id": complete["eos_token_id"], "top_k": 7}


def test_the_adapters_base(preset):
    model = tuned(preset("31b"))
    assert Preset(str(preset("31b"))).hf_name == str(preset("31b").absolute())
    config = adapter_config(model, "google/gemma-4-31B-it", TEXT_PREFIX)
    assert config["base_model_name_or_path"] == "google/gemma-4-31B-it"
    assert config["target_modules"] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
