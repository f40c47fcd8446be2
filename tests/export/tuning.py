"""Tuned models without training: random adapters on a preset."""

from pathlib import Path

import numpy as np

from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model import lora
from keras_gemma_ft.model.loading import open_source
from keras_gemma_ft.model.lora import LoraConfig
from keras_gemma_ft.model.weights import lora_targets

LORA = LoraConfig(rank=3, alpha=7.5, dropout=0.05)


def adapters(preset: Path, config: LoraConfig = LORA) -> dict[str, np.ndarray]:
    """Factors by name as a checkpoint has them; B is random too, so that they do something."""
    random = np.random.default_rng(7)
    return {
        f"{weight.name}/{factor}": random.normal(0, 0.3, shape).astype(np.float32)
        for weight in lora_targets(open_source(preset).config, config.targets)
        for factor, shape in lora.shapes(weight, config.rank).items()
    }


def tuned(preset: Path, config: LoraConfig = LORA) -> Tuned:
    return Tuned(open_source(preset), adapters(preset, config), config)
