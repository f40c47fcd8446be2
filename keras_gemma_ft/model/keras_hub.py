"""KerasHub's Gemma 4: its preset files read tensor by tensor, and stock models from ours and into ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import jax.numpy as jnp
import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.weights import KERAS_HUB_WEIGHTS, Weight, table

Parts = Callable[[Weight, tuple[int, ...]], np.ndarray]
"""One layer's weight in Hugging Face's orientation, or the whole one for index (); see `loading.Source`."""

# What a text decoder does without: the towers, and states of random number generators.
_IGNORED = re.compile(r"layers/gemma4_(vision|audio)_encoder/|(.*/)?seed_generator/")
_FLOATS = ("float32", "bfloat16", "float16")


class KerasHubSource:
    """A KerasHub preset's directory: config.json, and model.weights.h5 or shards with model.weights.json.

    The KerasHub model is never built. Weights that lie in the file in one piece are mapped, not read.

    Args:
        directory: Of a `Gemma4Backbone` or `Gemma4CausalLM`, as their `save_to_preset` writes it.

    Attributes:
        config: Of the decoder.
        dtype: What the token embedding is stored in.
        ignored: Variables of the vision and audio towers.

    Raises:
        UserError: A file or a weight is missing, misshapen, quantized, or not of a Gemma 4 text decoder.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        saved = _read_json(self._directory / "config.json")
        if saved.get("class_name") != "Gemma4Backbone":
            raise UserError(
                f"holds a {saved.get('class_name')}, not a Gemma4Backbone",
                where=str(self._directory / "config.json"),
                remedy="give a preset of Gemma 4: E2B, E4B, 26B-A4B, 31B or the embedded gemma4_tiny.",
            )
        self.config = Gemma4Config.from_keras_hub(saved["config"])
        self._variables = {
            variable.name: variable for path in self._files() for variable in _variables_of(path)
        }
        self.ignored = self._check()
        self.dtype = self._variables["layers/reversible_embedding/vars/0"].dtype

    def part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        arrays = [self._variables[name].read() for name in _file_names(self.config, weight, index)]
        return KERAS_HUB_WEIGHTS[weight.role].to_ours(arrays, weight.shape)

    def _files(self) -> list[Path]:
        single = self._directory / "model.weights.h5"
        if single.is_file():
            return [single]
        shards = _read_json(self._directory / "model.weights.json")["weight_map"].values()
        names = {name for given in shards for name in ([given] if isinstance(given, str) else given)}
        return [self._directory / name for name in sorted(names)]

    def _check(self) -> tuple[str, ...]:
        """Every weight of the decoder is there in its shape, and nothing else but what may be ignored."""
        wanted: dict[str, Any] = {}
        for weight in table(self.config).values():
            shape = KERAS_HUB_WEIGHTS[weight.role].shape(weight.shape, _head_dim(self.config, weight))
            for index in _indices(weight):
                wanted |= dict.fromkeys(_file_names(self.config, weight, index), shape)
        for name, shape in wanted.items():
            found = self._variables.get(name)
            if found is None:
                raise self._error(
                    f"the weight {name} is missing", "download the preset again, or save it again."
                )
            if found.dtype not in _FLOATS:
                raise self._error(
                    f"the weight {name} is stored as {found.dtype}: the preset is quantized",
                    'give the preset that is not; quantization="nf4" then quantizes it as it is read.',
                )
            if found.shape != shape:
                raise self._error(
                    f"the weight {name} has shape {list(found.shape)}, "
                    f"where config.json asks for {list(shape)}",
                    "use the config.json that was saved with the weights.",
                )
        rest = sorted(self._variables.keys() - wanted.keys())
        for name in rest:
            if not _IGNORED.match(name):
                raise self._error(
                    f"the weight {name} belongs to no part of this decoder",
                    "use the config.json that was saved with the weights.",
                )
        return tuple(rest)

    def _error(self, what: str, remedy: str) -> UserError:
        return UserError(what, where=str(self._directory), remedy=remedy)


def from_keras_hub(model: Any) -> _ModelSource:
    """The weights of a KerasHub `Gemma4CausalLM` or `Gemma4Backbone`, LoRA merged, as a `loading.Source`.

    Raises:
        UserError: It is neither, it is quantized, or it is no published text decoder's kind.
    """
    return _ModelSource(model)


def to_keras_hub(config: Gemma4Config, parts: Parts, dtype: str = "float32") -> Any:
    """A stock KerasHub `Gemma4Backbone`, text only.

    Args:
        config: Of the decoder.
        parts: Gives each layer's weights, merged and not quantized.
        dtype: Keras dtype policy of the backbone.
    """
    import keras_hub

    backbone = keras_hub.models.Gemma4Backbone(**config.to_keras_hub(), dtype=dtype)
    for weight in table(config).values():
        names = KERAS_HUB_WEIGHTS[weight.role]
        for index in _indices(weight):
            arrays = names.from_ours(np.asarray(parts(weight, index)), _head_dim(config, weight))
            for variable, array in zip(_of_model(backbone, weight, index), arrays, strict=True):
                variable.assign(array)
    return backbone


class _ModelSource:
    """Weights of a live KerasHub model; see `from_keras_hub`."""

    def __init__(self, model: Any) -> None:
        from keras_hub.models import Gemma4Backbone, Gemma4CausalLM

        backbone = model.backbone if isinstance(model, Gemma4CausalLM) else model
        if not isinstance(backbone, Gemma4Backbone):
            raise UserError(
                f"a {type(model).__name__} is no Gemma 4 of KerasHub",
                where="from_keras_hub",
                remedy="give a keras_hub.models.Gemma4CausalLM or Gemma4Backbone.",
            )
        if getattr(model, "final_logit_cap", None) is not None:
            raise UserError(
                f"its final_logit_cap is {model.final_logit_cap}, on top of the backbone's soft cap",
                where="from_keras_hub",
                remedy="make the Gemma4CausalLM with final_logit_cap=None, as its presets are.",
            )
        self._backbone = backbone
        self.config = Gemma4Config.from_keras_hub(backbone.get_config())
        self.dtype = str(backbone.token_embedding.embeddings.dtype)
        towers = (backbone.vision_encoder, backbone.audio_encoder)
        self.ignored = tuple(
            variable.path for tower in towers if tower is not None for variable in tower.weights
        )
        for variable in backbone.weights:
            if "int" in str(variable.dtype) and variable.path not in self.ignored:
                raise UserError(
                    f"its weight {variable.path} is stored as {variable.dtype}: the model is quantized",
                    where="from_keras_hub",
                    remedy='load it without quantization; quantization="nf4" here then quantizes it.',
                )

    def part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        import keras

        variables = _of_model(self._backbone, weight, index)
        arrays = [np.asarray(keras.ops.convert_to_tensor(variable)) for variable in variables]
        return KERAS_HUB_WEIGHTS[weight.role].to_ours(arrays, weight.shape)


def _of_model(backbone: Any, weight: Weight, index: tuple[int, ...]) -> Iterator[Any]:
    """The variables of a live model that hold one part of a weight (LoRA's sum, where it is enabled)."""
    start = backbone.transformer_layers[weight.layers[index]] if weight.in_layers else backbone
    for path, attribute, _ in KERAS_HUB_WEIGHTS[weight.role].variables:
        layer = start
        for name in filter(None, path.split("/")):
            layer = getattr(layer, name)
        yield getattr(layer, attribute)


def _file_names(config: Gemma4Config, weight: Weight, index: tuple[int, ...]) -> Iterator[str]:
    """The datasets of an h5 file that hold one part of a weight."""
    names = KERAS_HUB_WEIGHTS[weight.role]
    for path, _, number in names.variables:
        if weight.in_layers:
            block = "gemma4_text_decoder_block" + (f"_{layer}" if (layer := weight.layers[index]) else "")
            path = f"{block}/{path}" if path else block
        else:
            second = weight.name == "norm" and config.hidden_size_per_layer_input
            path = f"{names.file_layer}_1" if second else f"{names.file_layer}"
        yield f"layers/{path}/vars/{number}"


def _indices(weight: Weight) -> list[tuple[int, ...]]:
    return list(np.ndindex(weight.layers.shape)) if weight.in_layers else [()]


def _head_dim(config: Gemma4Config, weight: Weight) -> int:
    return config.kind(*weight.name.split("/")[:2]).head_dim if weight.in_layers else 0


@dataclass(frozen=True)
class _Variable:
    """A dataset of an h5 file; `offset` is where its bytes lie in one piece, None where they do not."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int | None

    def read(self) -> np.ndarray:
        if self.offset is not None and self.shape:
            return np.memmap(self.path, jnp.dtype(self.dtype), "r", self.offset, self.shape)
        with h5py.File(self.path) as file:
            return np.asarray(file[self.name][()]).view(jnp.dtype(self.dtype))


def _variables_of(path: Path) -> list[_Variable]:
    found: list[_Variable] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            # Keras stores bfloat16 as bytes without a type, and says so.
            dtype = str(item.attrs.get("dtype", item.dtype))
            found.append(_Variable(path, name, item.shape, dtype, item.id.get_offset()))

    try:
        with h5py.File(path) as file:
            file.visititems(visit)
    except OSError as error:
        raise UserError(
            f"the weights cannot be read: {str(error).splitlines()[0]}",
            where=str(path),
            remedy="give a directory with model.weights.h5, or with all shards of model.weights.json.",
        ) from error
    return found


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            remedy="give a KerasHub preset's directory, as save_to_preset writes it.",
        ) from error
