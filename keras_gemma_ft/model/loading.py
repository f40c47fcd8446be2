"""Weights on their way into a model: from where they lie, tensor by tensor, quantized as they pass.

A `Source` gives one layer's weight at a time. `load` stacks them; what is to be quantized is quantized layer
by layer on the device, so that no unquantized stack of it ever exists.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import reading
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.weights import Weight
from keras_gemma_ft.model.weights import table as weights_of
from keras_gemma_ft.ops import host
from keras_gemma_ft.ops.dropout import fold, mix
from keras_gemma_ft.ops.quantize import Kind, QuantizedTensor, quantize, quantize_pieces

Storage = Kind | Literal["host"]
"""How a weight is stored, unless it is as the model's dtype says: quantized, or in the host's memory."""
Quantization = Mapping[str, Storage]
"""`weights`, `embedding`, `per_layer_embedding` → how it is stored; only the last can be on the host."""

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
# Weights of a whole Gemma 4 that a text decoder does without: the towers, and the tied head.
_IGNORED = re.compile(
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\.|lm_head\."
)
_SHARED_KV = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_PIECE = 128 * 2**20  # bytes of an embedding table that are unquantized at a time


class Source(Protocol):
    """Where a decoder's weights lie.

    Attributes:
        config: Of the decoder.
        dtype: What the weights are stored in, such as "bfloat16".
        ignored: Names of weights that lie there and that a text decoder does without.
    """

    config: Gemma4Config
    dtype: str
    ignored: tuple[str, ...]

    def part(self, weight: Weight, index: tuple[int, ...]) -> Any:
        """One layer's weight in Hugging Face's orientation, `weight.shape`; the whole one for `index` ()."""


class HFSource:
    """A Hugging Face directory: config.json and model.safetensors, or shards with an index.

    Args:
        directory: Of whole Gemma 4 models or of text decoders alone.

    Raises:
        UserError: A file or a weight is missing, misshapen, or not of this decoder.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self.config = Gemma4Config.from_hf(_read_json(self._directory / "config.json"))
        self._files = [_Safetensors(path) for path in self._weight_files()]
        self._where = {name: file for file in self._files for name in file.names}
        self._prefix = self._find_prefix()
        self.ignored = self._check()
        self.dtype = self._where[f"{self._prefix}embed_tokens.weight"].dtype(
            f"{self._prefix}embed_tokens.weight"
        )

    def part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        name = self._prefix + dict(weight.hf_names())[index]
        return self._where[name].read(name).reshape(weight.shape)

    def _weight_files(self) -> list[Path]:
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(
                    "holds no weight_map", where=str(index), remedy="download the checkpoint again."
                )
            names = sorted(set(shards.values()))
        else:
            names = ["model.safetensors"]
        return [self._directory / name for name in names]

    def _find_prefix(self) -> str:
        for prefix in _PREFIXES:
            if f"{prefix}embed_tokens.weight" in self._where:
                return prefix
        raise UserError(
            "holds no weight embed_tokens.weight of a text decoder",
            where=str(self._directory),
            remedy="give the directory of a Gemma 4 checkpoint as it was published.",
        )

    def _check(self) -> tuple[str, ...]:
        """Every weight of the decoder is there in its shape, and nothing else but what may be ignored."""
        wanted = {}
        for weight in weights_of(self.config).values():
            for _, name in weight.hf_names():
                wanted[self._prefix + name] = weight.shape
        for name, shape in wanted.items():
            if name not in self._where:
                raise UserError(
                    f"the weight {name} is missing",
                    where=str(self._directory),
                    remedy="download the checkpoint again; config.json must be the one that belongs to it.",
                )
            stored = self._where[name].shape(name)
            # A layer's scalar is stored as [1] or as [].
            if math.prod(stored) != math.prod(shape) or (len(shape) > 1 and stored != shape):
                raise UserError(
                    f"the weight {name} has shape {list(stored)}, where config.json asks for {list(shape)}",
                    where=str(self._directory),
                    remedy="use the config.json that belongs to the weights.",
                )
        rest = sorted(self._where.keys() - wanted.keys())
        first_shared = self.config.num_hidden_layers - self.config.num_kv_shared_layers
        for name in rest:
            shared = _SHARED_KV.match(name.removeprefix(self._prefix))
            if not _IGNORED.match(name) and not (shared and int(shared[1]) >= first_shared):
                raise UserError(
                    f"the weight {name} belongs to no part of this decoder",
                    where=str(self._directory),
                    remedy="use the config.json that belongs to the weights; merge adapters before.",
                )
        return tuple(rest)


class _Safetensors:
    """One file, memory-mapped. The library itself has no bfloat16 for numpy."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            self._data = np.memmap(path, np.uint8, "r", offset=8 + size)
        except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"the weights cannot be read ({getattr(error, 'strerror', None) or 'no safetensors file'})",
                where=str(path),
                remedy="give a directory with model.safetensors, or with all shards of its index.",
            ) from error
        if end > self._data.size:
            raise UserError(
                f"ends {end - self._data.size:,} bytes before its weights do",
                where=str(path),
                remedy="download the checkpoint again.",
            )
        self._header = header
        self.names = list(header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> str:
        return str(self._dtype(name))

    def read(self, name: str) -> np.ndarray:
        start, end = self._header[name]["data_offsets"]
        return self._data[start:end].view(self._dtype(name)).reshape(self.shape(name))

    def _dtype(self, name: str) -> np.dtype:
        stored = self._header[name]["dtype"]
        if stored not in _DTYPES:
            raise UserError(
                f"the weight {name} is stored as {stored}",
                where="model.safetensors",
                remedy=f"use a checkpoint in {', '.join(_DTYPES)}.",
            )
        return _DTYPES[stored]


class RandomSource:
    """Random weights, made on the device: matrices uniform with deviation 0.02, norms and scalars 1.

    Args:
        config: Of the decoder.
        seed: With the weight's name it determines the values.
    """

    def __init__(self, config: Gemma4Config, seed: int = 0, dtype: str = "bfloat16") -> None:
        self.config = config
        self.dtype = dtype
        self.ignored: tuple[str, ...] = ()
        self._key = jnp.asarray([seed, 0], jnp.uint32)
        self._places = {name: place for place, name in enumerate(weights_of(config))}

    def part(self, weight: Weight, index: tuple[int, ...]) -> Any:
        if weight.use == "small" and weight.role != "router_proj":
            return jnp.ones(weight.shape, self.dtype)
        place = int(np.ravel_multi_index(index, weight.layers.shape)) if index else 0
        key = fold(fold(self._key, self._places[weight.name]), place)
        if weight.use == "embedding":
            return _RandomTable(key, weight.shape, np.dtype(self.dtype))
        return _uniform(key, weight.shape, self.dtype)


class _RandomTable:
    """A table too large to be made at once: `table[start:end]` makes these rows."""

    def __init__(self, key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype, self._key = shape, dtype, key

    def __getitem__(self, rows: slice) -> jax.Array:
        start, stop, _ = rows.indices(self.shape[0])
        return _uniform(fold(self._key, start), (stop - start, self.shape[1]), str(self.dtype))


@jax.jit(static_argnums=(1, 2))
def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    # The hash of dropout: a generator proper would take longer to compile than all else that makes a model.
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    whole = mix(index * (key[1] | 1) + key[0]).astype(jnp.float32) * np.float32(2**-31) - 1
    return (0.02 * math.sqrt(3) * whole).astype(dtype)


def open_source(directory: str | Path) -> Source:
    """The weights of a preset's directory, Hugging Face's or KerasHub's.

    Raises:
        UserError: It holds neither, or its files are faulty.
    """
    directory = Path(directory)
    if "registered_name" in _read_json(directory / "config.json"):
        from keras_gemma_ft.model.keras_hub import KerasHubSource

        return KerasHubSource(directory)
    return HFSource(directory)


def load(
    source: Source, dtype: str, quantization: Quantization | None = None
) -> Iterator[tuple[str, jax.Array | QuantizedTensor]]:
    """All weights by name, stacked, on the default device, one after the other.

    Args:
        source: Where they come from.
        dtype: Of what is not quantized.
        quantization: See `Quantization`; None: nothing is.
    """
    weights = weights_of(source.config)
    kinds = {name: kind_of(weight, quantization) for name, weight in weights.items()}
    arrays = (
        (name, array)
        for name, weight in weights.items()
        for array in _arrays(source, weight, whole=kinds[name] == "host")
    )
    for name, its_arrays in itertools.groupby(reading.ahead(arrays), key=lambda item: item[0]):
        parts = (array for _, array in its_arrays)
        yield name, _load_one(weights[name], parts, dtype, kinds[name])


def checked(given: str | Mapping[str, str] | None, config: Gemma4Config) -> Quantization:
    """What is quantized, from a kind for all of the decoder's matrices or a mapping.

    Raises:
        UserError: There is no such kind, or no such part in this decoder.
    """
    if given is None:
        return {}
    settings = {"weights": given} if isinstance(given, str) else dict(given)
    for part, kind in settings.items():
        known = part in ("weights", "embedding", "per_layer_embedding") and kind in ("nf4", "int8")
        if not known and (part, kind) != ("per_layer_embedding", "host"):
            raise UserError(
                f"{part}: {kind!r} is no quantization",
                where="quantization",
                remedy="give 'nf4' or 'int8', or a mapping from weights, embedding and per_layer_embedding; "
                "only the per-layer embedding can be 'host'.",
            )
    if "per_layer_embedding" in settings and not config.hidden_size_per_layer_input:
        raise UserError(
            "this model has no per-layer embedding",
            where="quantization.per_layer_embedding",
            remedy="leave it out, or use E2B or E4B.",
        )
    return settings  # type: ignore[return-value]


def kind_of(weight: Weight, quantization: Quantization | None) -> Storage | None:
    """How a weight is stored; None: in the model's dtype, on the device."""
    if not quantization or weight.use == "small":
        return None
    if weight.use == "embedding":
        setting = "embedding" if weight.name == "embed_tokens" else "per_layer_embedding"
        return quantization.get(setting)
    return quantization.get("weights")


def _arrays(source: Source, weight: Weight, *, whole: bool) -> Iterator[Any]:
    """What a weight is read as: layer by layer, a table in pieces unless `whole`."""
    if weight.in_layers:
        return (source.part(weight, index) for index in _places(weight))
    part = source.part(weight, ())
    return _pieces(part) if weight.use == "embedding" and not whole else iter([part])


def _places(weight: Weight) -> list[tuple[int, ...]]:
    return list(np.ndindex(weight.layers.shape))


def _load_one(
    weight: Weight, arrays: Iterator[Any], dtype: str, kind: Storage | None
) -> jax.Array | QuantizedTensor:
    if kind == "host":
        return _on_host(next(arrays), dtype)
    if kind is None:
        return _stacked(weight, arrays, dtype)
    on_device = map(jax.device_put, arrays)
    if weight.use == "embedding":
        return quantize_pieces(on_device, weight.shape[0], kind)
    quantized = (_quantize(array, kind) for array in on_device)
    return _in_place(weight, quantized) if weight.in_layers else next(quantized)


_quantize = jax.jit(quantize, static_argnums=1)


def _on_host(table: Any, dtype: str) -> jax.Array:
    if not (isinstance(table, np.ndarray) and table.dtype == jnp.dtype(dtype)):
        pieces, row = _pieces(table), 0
        table = np.empty(table.shape, jnp.dtype(dtype))
        for piece in pieces:
            table[row : row + len(piece)] = piece
            row += len(piece)
    try:
        return host.place(table)
    except NotImplementedError as error:
        raise UserError(
            str(error),
            where="quantization.per_layer_embedding=host",
            remedy="choose int8 or nf4, or leave it on the device.",
        ) from error


def _stacked(weight: Weight, arrays: Iterator[Any], dtype: str) -> jax.Array:
    first = next(arrays)
    arrays = itertools.chain([first], arrays)
    if isinstance(first, jax.Array):
        if weight.in_layers:
            return _in_place(weight, (array.astype(dtype) for array in arrays))
        table, row = jnp.zeros(weight.shape, dtype), 0
        for rows in arrays:
            table, row = _put_rows(table, rows, row), row + len(rows)
        return table
    stacked = reading.aligned(weight.stacked_shape, jnp.dtype(dtype))
    if weight.in_layers:
        for place, array in zip(_places(weight), arrays, strict=True):
            stacked[place] = array
    else:
        row = 0
        for rows in arrays:
            stacked[row : row + len(rows)] = rows
            row += len(rows)
    # Until it has arrived, this copy lives on; the next weight's would come to lie beside it.
    return jax.device_put(stacked).block_until_ready()


@jax.jit(donate_argnums=0)
def _put_rows(out: jax.Array, rows: jax.Array, place: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, rows.astype(out.dtype), place, 0)


def _in_place(weight: Weight, parts: Iterable[Any]) -> Any:
    """A stack of the layers' parts, each put to its place at once.

    Kept until the end and stacked then, they would exist twice; and so would a stack that changes its shape.
    """
    stack: Any = None
    for place, part in zip(_places(weight), parts, strict=True):
        if stack is None:
            stack = jax.tree.map(
                lambda leaf: jnp.zeros((*weight.layers.shape, *leaf.shape), leaf.dtype), part
            )
        stack = _put_layer(stack, part, np.array(place, np.int32))
    return stack


@jax.jit(donate_argnums=0)
def _put_layer(stack: Any, layer: Any, place: jax.Array) -> Any:
    def put(out: jax.Array, part: jax.Array) -> jax.Array:
        start = [*place, *[0] * part.ndim]
        return jax.lax.dynamic_update_slice(out, part.reshape((1,) * len(place) + part.shape), start)

    return jax.tree.map(put, stack, layer)


def _pieces(matrix: Any) -> Iterator[Any]:
    rows = max(64, _PIECE // (matrix.shape[1] * matrix.dtype.itemsize) // 64 * 64)
    return (matrix[start : start + rows] for start in range(0, matrix.shape[0], rows))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            remedy="give the directory of a Gemma 4 checkpoint, complete.",
        ) from error
