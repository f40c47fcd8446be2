"""What exports ask of the preset that a model started from: its tokenizer, and what others call it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.export import tokenizer as hf_tokenizer
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.presets import resolve_preset

_HF = "hf://"


class Preset:
    """A preset, Hugging Face's or KerasHub's.

    Args:
        name: As for `GemmaCausalLM.from_preset`.

    Raises:
        UserError: There is none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = resolve_preset(name)

    @property
    def is_keras_hub(self) -> bool:
        return "registered_name" in self._config

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole Gemma 4 with its towers, not a text decoder alone."""
        if self.is_keras_hub:
            config = self._config["config"]
            return any(config.get(tower) is not None for tower in ("vision_encoder", "audio_encoder"))
        return "text_config" in self._config

    @property
    def hf_name(self) -> str:
        """By which transformers finds it: a name on the Hub, or a directory."""
        return self.name.removeprefix(_HF) if self.name.startswith(_HF) else str(self.directory.absolute())

    def write_tokenizer(self, directory: Path, config: Gemma4Config) -> None:
        """Writes the tokenizer's files: a Hugging Face directory's own, unchanged, and what it lacks."""
        tokenizer = Tokenizer.from_preset(self.name)
        if not self.is_keras_hub:
            hf_tokenizer.copy_tokenizer(self.directory, directory)
        write_tokenizer(tokenizer, directory, config)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return json.loads((self.directory / "config.json").read_text(encoding="utf-8"))


def write_tokenizer(tokenizer: Tokenizer, directory: Path, config: Gemma4Config) -> None:
    """Makes the tokenizer's files that a directory lacks."""
    about = config.variant, config.max_position_embeddings
    path = directory / "tokenizer.json"
    if not path.is_file() and tokenizer.path.suffix != ".json":
        hf_tokenizer.write_tokenizer(directory, tokenizer.serialized, *about)
        return
    if not path.is_file():
        path.write_bytes(tokenizer.serialized)
    vocabulary = {piece: index for index, piece in enumerate(tokenizer.pieces)}
    hf_tokenizer.complete_tokenizer(directory, vocabulary, *about)
