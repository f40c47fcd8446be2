"""Presets are found where they are said to be, and what is no preset is told in one message."""

import sys
from types import SimpleNamespace

import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.presets import keras_hub_presets, resolve_preset


def test_a_directory_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_preset(str(tmp_path)) == tmp_path


def test_what_is_no_preset_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_preset(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file") as caught:
        resolve_preset(str(tmp_path / "model.safetensors"))
    assert caught.value.remedy.endswith(str(tmp_path))


def test_near_names_are_offered():
    with pytest.raises(UserError, match="no such preset") as caught:
        resolve_preset("gemma4_instruct_4B")
    assert "gemma4_instruct_4b" in caught.value.remedy
    with pytest.raises(UserError) as caught:
        resolve_preset("llama")
    assert "hf://ORG/NAME" in caught.value.remedy


def test_keras_hub_names_are_those_of_keras_hub():
    import keras_hub

    published = keras_hub_presets()
    known = keras_hub.models.Gemma4Backbone.presets
    assert published == {name: known[name]["kaggle_handle"] for name in published}
    assert {"gemma4_instruct_2b", "gemma4_31b"} <= set(published)


def test_hubs_are_asked_for_the_whole_preset(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def download(name, **options):
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(model_download=download))
    for preset in ("hf://org/name", "kaggle://a/b/keras/c/1", "gemma4_instruct_2b"):
        assert resolve_preset(preset) == tmp_path
    assert asked == [
        "org/name",
        "a/b/keras/c/1",
        keras_hub_presets()["gemma4_instruct_2b"].removeprefix("kaggle://"),
    ]


def test_a_hub_that_fails_is_told_without_its_traceback(monkeypatch):
    def refuse(name, **options):
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(UserError, match="no route to the hub") as caught:
        resolve_preset("hf://org/name")
    assert str(caught.value).count("\n") == 1
    with pytest.raises(UserError, match="no handle"):
        resolve_preset("hf://name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="not installed"):
        resolve_preset("hf://org/name")
