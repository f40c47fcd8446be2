"""KerasHub's presets read from their files, and KerasHub's models from ours and into ours."""

import json
import shutil

import h5py
import keras
import numpy as np
import pytest
from decoders import distance, keras_hub_logits, logits, tokens
from small_models import KINDS

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.keras_hub import KerasHubSource, from_keras_hub, to_keras_hub
from keras_gemma_ft.model.loading import HFSource, open_source
from keras_gemma_ft.model.weights import table

# Keras's own, on saving and on loading what it saved (3.15.1 with numpy 2).
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping nested container at:UserWarning"),
]


def assert_same_weights(found, expected):
    for weight in table(expected.config).values():
        for index in np.ndindex(weight.layers.shape) if weight.in_layers else [()]:
            part = found.part(weight, index)
            assert part.shape == weight.shape and part.dtype == np.float32
            np.testing.assert_array_equal(part, expected.part(weight, index), err_msg=f"{weight.name}{index}")


def without_length(config: Gemma4Config) -> dict:
    """KerasHub does not say how long a text may be."""
    return config.to_hf() | {"max_position_embeddings": None}


@pytest.fixture(scope="session")
def keras_hub_preset(keras_hub_backbone, tmp_path_factory):
    """Gives the directory of a kind's preset, as KerasHub saves it."""
    folder = tmp_path_factory.mktemp("keras_hub")

    def make(kind: str):
        if not (folder / kind).exists():
            keras_hub_backbone(kind).save_to_preset(str(folder / kind))
        return folder / kind

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_presets_are_read(hf_directory, keras_hub_preset, kind):
    expected = HFSource(hf_directory(kind))
    source = open_source(keras_hub_preset(kind))
    assert isinstance(source, KerasHubSource)
    assert without_length(source.config) == without_length(expected.config)
    assert (source.dtype, source.ignored) == ("float32", ())
    assert_same_weights(source, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_taken_over(hf_directory, keras_hub_backbone, kind):
    expected = HFSource(hf_directory(kind))
    source = from_keras_hub(keras_hub_backbone(kind))
    assert without_length(source.config) == without_length(expected.config)
    assert source.dtype == "float32"
    assert_same_weights(source, expected)


@pytest.fixture(scope="module")
def small_preset(keras_hub_preset, tmp_path_factory):
    """Gives a copy of a kind's preset that a test may break."""

    def make(kind: str = "31b"):
        target = tmp_path_factory.mktemp("broken")
        shutil.copytree(keras_hub_preset(kind), target, dirs_exist_ok=True)
        return target

    return make


def test_shards_are_read(hf_directory, keras_hub_backbone, tmp_path):
    keras_hub_backbone("26b_a4b").save_to_preset(str(tmp_path), max_shard_size=2e-5)  # GiB
    shards = sorted(path.name for path in tmp_path.glob("*.h5"))
    assert len(shards) > 3 and not (tmp_path / "model.weights.h5").exists()
    assert_same_weights(KerasHubSource(tmp_path), HFSource(hf_directory("26b_a4b")))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(UserError, match=rf"{shards[1]}: the weights cannot be read"):
        KerasHubSource(tmp_path)


def test_bfloat16_is_read_as_it_is(hf_directory, tmp_path):
    expected = HFSource(hf_directory("31b"))
    to_keras_hub(expected.config, expected.part, dtype="bfloat16").save_to_preset(str(tmp_path))
    source = KerasHubSource(tmp_path)
    assert source.dtype == "bfloat16"
    for weight in table(source.config).values():
        for index in np.ndindex(weight.layers.shape) if weight.in_layers else [()]:
            part = source.part(weight, index)
            np.testing.assert_array_equal(part, expected.part(weight, index).astype(part.dtype))
            assert str(part.dtype) == "bfloat16"


def test_large_weights_are_mapped_not_read(keras_hub_preset):
    source = KerasHubSource(keras_hub_preset("e2b"))
    weights = table(source.config)
    for name in ("embed_tokens", "embed_tokens_per_layer"):
        assert isinstance(source.part(weights[name], ()), np.memmap)


def test_a_chunked_file_is_read(hf_directory, small_preset):
    directory = small_preset()
    path = directory / "model.weights.h5"
    name = "layers/gemma4_text_decoder_block_1/gating_ffw/vars/0"
    with h5py.File(path, "r+") as file:
        values = file[name][()]
        del file[name]
        file.create_dataset(name, data=values, chunks=(8, 8), compression="gzip")
    assert_same_weights(KerasHubSource(directory), HFSource(hf_directory("31b")))


def test_towers_are_named_as_ignored(hf_directory, tmp_path):
    import keras_hub

    expected = HFSource(hf_directory("31b"))
    vision = keras_hub.models.Gemma4VisionEncoder(
        image_size=8, patch_size=4, num_heads=2, hidden_dim=8, num_layers=1, intermediate_dim=8, head_dim=4,
        output_dim=32, pool_size=1, position_embedding_size=8,
    )  # fmt: skip
    audio = keras_hub.models.Gemma4AudioEncoder(
        input_feat_size=16, hidden_size=8, num_heads=2, num_layers=1, sscp_conv_channels=(4, 2),
        output_proj_dims=8, output_dim=32,
    )  # fmt: skip
    whole = keras_hub.models.Gemma4Backbone(
        **expected.config.to_keras_hub() | {"image_size": 8}, vision_encoder=vision, audio_encoder=audio
    )
    whole.save_to_preset(str(tmp_path))
    source, live = KerasHubSource(tmp_path), from_keras_hub(whole)
    assert_same_weights(source, live)
    assert len(source.ignored) == len(live.ignored) == len(vision.weights) + len(audio.weights)
    assert {name.split("/")[1] for name in source.ignored} == {
        "gemma4_vision_encoder",
        "gemma4_audio_encoder",
    }


def remove(name):
    def change(file):
        del file[name]

    return change


def replace(name, make):
    def change(file):
        value = make(file[name][()]) if name in file else make(None)
        if name in file:
            del file[name]
        file[name] = value

    return change


BLOCK = "layers/gemma4_text_decoder_block_5"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (remove(f"{BLOCK}/attention/key_norm/vars/0"), f"{BLOCK}/attention/key_norm/vars/0 is missing"),
        (
            replace(f"{BLOCK}/ffw_linear/vars/0", np.transpose),
            r"ffw_linear/vars/0 has shape \[32, 48\], where config.json asks for \[48, 32\]",
        ),
        (
            replace(f"{BLOCK}/attention/query_dense/vars/0", lambda value: value.reshape(8, 32, 8)),
            r"query_dense/vars/0 has shape \[8, 32, 8\], where config.json asks for \[4, 32, 16\]",
        ),
        (
            replace(f"{BLOCK}/gating_ffw/vars/0", lambda value: value.astype(np.int8)),
            "gating_ffw/vars/0 is stored as int8: the preset is quantized",
        ),
        (
            replace("layers/gemma4_text_decoder_block_6/vars/0", lambda _: np.float32(1)),
            "layers/gemma4_text_decoder_block_6/vars/0 belongs to no part",
        ),
    ],
    ids=["missing", "transposed", "other heads", "quantized", "one layer more"],
)
def test_faulty_files_are_named(small_preset, change, complaint):
    directory = small_preset()
    with h5py.File(directory / "model.weights.h5", "r+") as file:
        change(file)
    with pytest.raises(UserError, match=complaint) as error:
        KerasHubSource(directory)
    assert error.value.where == str(directory) and error.value.remedy


def test_what_is_no_preset_of_gemma_4(small_preset):
    directory = small_preset()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"class_name": "GemmaBackbone"}))
    with pytest.raises(UserError, match="holds a GemmaBackbone, not a Gemma4Backbone"):
        KerasHubSource(directory)
    (directory / "model.weights.h5").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model.weights.json: cannot be read"):
        KerasHubSource(directory)


def test_a_model_of_ours_is_stock_there(decoder, keras_hub_preset):
    import keras_hub

    loaded = keras_hub.models.Gemma4Backbone.from_preset(str(keras_hub_preset("31b")), dtype="float32")
    rows = tokens()
    assert distance(keras_hub_logits(loaded, rows), logits(decoder("31b"), rows)) < 1e-5


def test_a_causal_lm_is_taken_over(keras_hub_backbone, hf_directory):
    import keras_hub

    backbone = keras_hub_backbone("31b")
    model = keras_hub.models.Gemma4CausalLM(preprocessor=None, backbone=backbone)
    assert_same_weights(from_keras_hub(model), HFSource(hf_directory("31b")))
    capped = keras_hub.models.Gemma4CausalLM(preprocessor=None, backbone=backbone, final_logit_cap=30.0)
    with pytest.raises(UserError, match=r"its final_logit_cap is 30\.0, on top of the backbone's soft cap"):
        from_keras_hub(capped)


def test_loras_of_keras_hub_are_merged(hf_directory):
    expected = HFSource(hf_directory("31b"))
    backbone = to_keras_hub(expected.config, expected.part)
    tuned = backbone.transformer_layers[1].gating_ffw
    tuned.enable_lora(2, lora_alpha=2)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 2), (2, 48)))
    tuned.lora_kernel_a.assign(a)
    tuned.lora_kernel_b.assign(b)
    weight = table(expected.config)["own/local/gate_proj"]
    found = from_keras_hub(backbone).part(weight, (0, 1))
    np.testing.assert_allclose(found, expected.part(weight, (0, 1)) + (a @ b).T, rtol=1e-5, atol=1e-5)


def test_quantized_models_are_refused(hf_directory):
    expected = HFSource(hf_directory("31b"))
    backbone = to_keras_hub(expected.config, expected.part)
    backbone.transformer_layers[3].ffw_linear.quantize("int8")
    with pytest.raises(UserError, match="decoder_block_3/ffw_linear/kernel is stored as int8"):
        from_keras_hub(backbone)
    with pytest.raises(UserError, match="a Sequential is no Gemma 4 of KerasHub"):
        from_keras_hub(keras.Sequential())
