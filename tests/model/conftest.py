"""Small decoders of every kind, float32 with random norms and scalars: ours, transformers' and KerasHub's."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from decoders import Decoder
from small_models import KINDS, write_hf

from keras_gemma_ft.model.loading import HFSource, load


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a kind's directory, as transformers writes it."""
    folder = tmp_path_factory.mktemp("hf")

    def make(kind: str) -> Path:
        if not (folder / kind).exists():
            write_hf(folder / kind, KINDS[kind])
        return folder / kind

    return make


@pytest.fixture(scope="session")
def decoder(hf_directory: Callable[[str], Path]) -> Callable[[str], Decoder]:
    """Gives our decoder of a kind."""

    @functools.cache
    def make(kind: str) -> Decoder:
        source = HFSource(hf_directory(kind))
        return Decoder(source.config, dict(load(source, "float32")))

    return make


@pytest.fixture(scope="session")
def torch_model(hf_directory: Callable[[str], Path]) -> Callable[[str], Any]:
    """Gives a new transformers model of a kind, with the same weights."""

    def make(kind: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(hf_directory(kind), attn_implementation="eager")

    return make


@pytest.fixture(scope="session")
def keras_hub_backbone(hf_directory: Callable[[str], Path]) -> Callable[[str], Any]:
    """Gives KerasHub's backbone of a kind, with the same weights."""

    @functools.cache
    def make(kind: str) -> Any:
        from keras_gemma_ft.model.keras_hub import to_keras_hub

        source = HFSource(hf_directory(kind))
        return to_keras_hub(source.config, source.part)

    return make
