"""What a config says about the data: its vocabulary, and the recipe by which rows are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from keras_gemma_ft.data.shards import Recipe
from keras_gemma_ft.data.template import Template, Variant
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.json_files import read_json


def tokenizer_and_recipe(config: Mapping[str, Any]) -> tuple[Tokenizer, Recipe]:
    """The preset's vocabulary and how the config makes rows; no weight is read.

    Raises:
        UserError: There is no such preset, or it is no Gemma 4.
    """
    data = config["data"]
    template = Template(variant_of(config["preset"]), thinking=data["thinking"], train_on=data["train_on"])
    recipe = Recipe(template, data["max_length"], data["packing"], data["truncation"], config["seed"])
    return Tokenizer.from_preset(config["preset"]), recipe


def variant_of(preset: str) -> Variant:
    """Which chat template the preset was trained with, told by its configuration alone.

    Raises:
        UserError: There is no such preset, or it is no Gemma 4.
    """
    from keras_gemma_ft.model.config import Gemma4Config
    from keras_gemma_ft.presets import resolve_preset

    stored = read_json(resolve_preset(preset) / "config.json")
    is_keras_hub = "registered_name" in stored
    config = Gemma4Config.from_keras_hub(stored["config"]) if is_keras_hub else Gemma4Config.from_hf(stored)
    return cast(Variant, config.variant)
