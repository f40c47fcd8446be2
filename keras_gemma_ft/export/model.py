"""Exports of a model in memory: what `GemmaCausalLM.export_to_transformers` and `.export_to_peft` do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.hf import export_hf
from keras_gemma_ft.export.peft import export_peft
from keras_gemma_ft.export.preset import Preset, write_tokenizer
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model.loading import Source, open_source
from keras_gemma_ft.model.weights import Weight
from keras_gemma_ft.ops.quantize import QuantizedTensor, dequantize

if TYPE_CHECKING:
    from keras_gemma_ft.model.causal_lm import GemmaCausalLM


def export_to_transformers(model: GemmaCausalLM, directory: str | Path) -> dict[str, Any]:
    """Writes a merged Hugging Face directory; see `export_hf`.

    Quantized weights are replaced by those of the preset, where the model came from one.
    """
    preset = None if model.preset is None else Preset(model.preset)
    config = model.config

    def tokenizer_files(target: Path) -> None:
        if preset is not None:
            preset.write_tokenizer(target, config)
        elif model.tokenizer is not None:
            write_tokenizer(model.tokenizer, target, config)

    return export_hf(directory, _tuned(model, preset), tokenizer_files, _about(model))


def export_to_peft(model: GemmaCausalLM, directory: str | Path) -> dict[str, Any]:
    """Writes the adapters for PEFT; see `export_peft`.

    Raises:
        UserError: The model came from no preset, so PEFT would have no base to put them on.
    """
    if model.preset is None:
        raise UserError(
            "the model came from no preset, so its adapters have no base that PEFT could load",
            where="export_to_peft",
            remedy="use export_to_transformers, which writes the whole model.",
        )
    preset = Preset(model.preset)
    tuned = _tuned(model, preset)
    return export_peft(directory, tuned, preset.hf_name, _about(model), whole=preset.is_whole)


class _Live:
    """A `Source` of the model's own weights without adapters; quantized ones are taken from its preset."""

    def __init__(self, model: GemmaCausalLM, published: Source | None) -> None:
        self._params = model.params()
        self._published = published
        self.config = model.config
        self.dtype = model.variable_dtype if published is None else published.dtype
        self.ignored: tuple[str, ...] = ()

    def part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        stored = self._params[weight.name]
        if isinstance(stored, QuantizedTensor):
            if self._published is not None:
                return self._published.part(weight, index)
            return np.asarray(dequantize(stored[index] if index else stored, np.float32))
        return np.asarray(stored[index])


def _tuned(model: GemmaCausalLM, preset: Preset | None) -> Tuned:
    published = None if preset is None else open_source(preset.directory)
    live = _Live(model, published)
    if model.lora is not None:
        adapters = model.adapters() or {}
        trained = {
            f"{name}/{factor}": np.asarray(value)
            for name, factors in adapters.items()
            for factor, value in factors.items()
        }
        return Tuned(live, trained, model.lora)
    trained = {
        name: value for name, value in model.params().items() if not isinstance(value, QuantizedTensor)
    }
    return Tuned(published or live, trained, None)


def _about(model: GemmaCausalLM) -> dict[str, Any]:
    return {
        "base": {"preset": model.preset},
        "trained": {
            "lora": None if model.lora is None else model.lora.to_json(),
            "quantization": dict(model.quantization) or None,
        },
    }
