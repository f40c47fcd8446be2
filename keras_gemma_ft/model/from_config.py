"""The model that a run's config describes."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from keras_gemma_ft.config import weights_quantization
from keras_gemma_ft.model.causal_lm import GemmaCausalLM


def build_model(config: ConfigDict) -> GemmaCausalLM:
    """The preset's model, with new adapters unless all weights are trained; `seed` determines all of it.

    Raises:
        UserError: There is no such preset, or the config does not fit it.
    """
    model = build_base(config)
    if config.method != "full":
        lora = config.lora
        model.enable_lora(lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
    model.settings = dataclasses.replace(model.settings, unroll=config.train.unroll)
    if config.train.remat != "auto":  # that needs a batch: train/remat_choice.py
        model.settings = dataclasses.replace(model.settings, remat=config.train.remat)
    return model


def build_base(config: ConfigDict) -> GemmaCausalLM:
    """The preset's model as training starts from it, without adapters.

    Where all weights are trained they are float32, with arithmetic in `precision`: an update smaller than a
    weight's last bfloat16 digit would be lost.

    Raises:
        UserError: There is no such preset, or the config does not fit it.
    """
    mixed = config.method == "full" and config.precision == "bfloat16"
    return GemmaCausalLM.from_preset(
        config.preset,
        quantization=weights_quantization(config),
        dtype="mixed_bfloat16" if mixed else config.precision,
        seed=config.seed,
    )
