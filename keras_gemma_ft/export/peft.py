"""Adapters as a directory that PEFT, vLLM and llama.cpp's converter load beside the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.certificate import certify, refused
from keras_gemma_ft.export.hf import not_finite
from keras_gemma_ft.export.shards import TensorSpec, write_file
from keras_gemma_ft.export.staging import staged
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.json_files import write_json
from keras_gemma_ft.model.lora import LoraConfig
from keras_gemma_ft.model.weights import EXPERTS, TEXT_PREFIX, WHOLE_PREFIX, peft_target_modules, table

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_peft(
    target: str | Path,
    tuned: Tuned,
    base: str,
    about: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """Writes the adapters in float32, as they were trained, with their certificate.

    Args:
        target: The directory; an earlier export there is replaced.
        tuned: Has the adapters.
        base: What PEFT is to load beneath: a directory, or a name on the Hugging Face Hub.
        about: What the certificate is to say besides.
        whole: The base is a whole Gemma 4 with its towers (transformers makes Gemma4ForConditionalGeneration
            of it), not a text decoder alone; modules have other names there.

    Returns:
        The certificate.

    Raises:
        UserError: There are no adapters, or experts have some; the target holds other files, or the
            certificate is refused. Then nothing is left behind.
    """
    if tuned.lora is None or not tuned.adapters:
        raise UserError(
            "all weights were trained: there is no adapter",
            where="--format=peft",
            remedy="use --format=hf, which writes the whole model.",
        )
    if any(name.rpartition("/")[2] in EXPERTS for name in tuned.adapters):
        # PEFT nests wrappers of parameters around the experts' module, names factors after the nesting, and
        # refuses dropout for the whole adapter then; no other reader of its files knows that form.
        raise UserError(
            "the experts have adapters, which are not written in PEFT's form",
            where="--format=peft",
            remedy="use --format=hf, which merges them, or train without experts_* in lora.targets.",
        )
    prefix = WHOLE_PREFIX if whole else TEXT_PREFIX
    arrays = _named(tuned, prefix)
    specs = [TensorSpec(name, array.shape, "float32") for name, array in arrays.items()]
    with staged(target) as directory:
        try:
            write_file(directory / WEIGHTS, specs, lambda spec: arrays[spec.name])
        except ValueError as error:
            raise not_finite(error) from error
        write_json(directory / CONFIG, adapter_config(tuned, base, prefix))
        reread = read_peft(directory, tuned)
        described = {"format": "peft", "dtype": "float32", **(about or {})}
        weights = _compare_factors(reread, tuned)
        return certify(directory, reread, tuned, described, weights, lossless=True)


def adapter_config(tuned: Tuned, base: str, prefix: str) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    assert tuned.lora is not None
    alpha = float(tuned.lora.alpha)
    roles = [name.rpartition("/")[2] for name in tuned.adapters]
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": tuned.lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": tuned.lora.rank,
        "target_modules": peft_target_modules(roles, prefix),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def read_peft(directory: Path, tuned: Tuned) -> Tuned:
    """The adapters of an export on the base of `tuned`, by what the files say alone."""
    from safetensors.numpy import load_file

    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    lora = LoraConfig(config["r"], config["lora_alpha"], config["lora_dropout"])
    arrays = load_file(directory / WEIGHTS)
    whole = next(iter(arrays)).startswith(f"base_model.model.{WHOLE_PREFIX}")
    trained = {}
    for weight in table(tuned.config).values():
        if weight.role not in config["target_modules"]:
            continue
        for factor in ("lora_a", "lora_b"):
            names = dict(weight.peft_names(factor, WHOLE_PREFIX if whole else TEXT_PREFIX))
            stack = np.stack([arrays.pop(name) for name in names.values()])
            trained[f"{weight.name}/{factor}"] = stack.reshape(*weight.layers.shape, *stack.shape[1:])
    if arrays:
        raise refused(f"{next(iter(arrays))} belongs to no weight")
    return Tuned(tuned.base, trained, lora)


def _named(tuned: Tuned, prefix: str) -> dict[str, np.ndarray]:
    """PEFT's name of every factor → its values."""
    weights = table(tuned.config)
    return {
        name: value[index]
        for weight_name, factors in tuned.adapters.items()
        for factor, value in factors.items()
        for index, name in weights[weight_name].peft_names(factor, prefix)
    }


def _compare_factors(reread: Tuned, tuned: Tuned) -> dict[str, Any]:
    compared = 0
    if reread.adapters.keys() != tuned.adapters.keys():
        raise refused("other matrices have adapters than were to be written")
    for name, factors in tuned.adapters.items():
        for factor, value in factors.items():
            compared += 1
            if not np.array_equal(reread.adapters[name][factor], value):
                raise refused(f"{name}/{factor} is not what was to be written")
    return {"compared": compared, "as_intended": True}
