"""Safetensors files written tensor by tensor, so that no more than one tensor is ever held.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, a JSON header with
every tensor's dtype, shape and byte range, then the tensors' bytes in that order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES: dict[str, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float16": ("F16", np.float16),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, its shape, and `float32`, `bfloat16` or `float16`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype][1]).itemsize


def write_sharded(
    directory: Path,
    specs: Sequence[TensorSpec],
    load: Callable[[TensorSpec], np.ndarray],
    max_shard_bytes: int = 5 * 10**9,
) -> list[str]:
    """Writes model.safetensors, or numbered shards and model.safetensors.index.json.

    Args:
        directory: An existing directory.
        specs: The tensors in the order of writing.
        load: Gives one tensor's values; called once for each, in order. They are cast to the spec's dtype.
        max_shard_bytes: A shard is closed before it would grow beyond this; a larger tensor has its own.

    Returns:
        The names of the weight files.

    Raises:
        ValueError: A tensor's shape is not the announced one, or it holds NaN or infinity.
    """
    shards = list(_split(specs, max_shard_bytes))
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
            "weight_map": {
                spec.name: file for file, shard in zip(names, shards, strict=True) for spec in shard
            },
        }
        text = json.dumps(index, indent=2)
        (directory / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    for file, shard in zip(names, shards, strict=True):
        write_file(directory / file, shard, load)
    return names


def write_file(path: Path, specs: Sequence[TensorSpec], load: Callable[[TensorSpec], np.ndarray]) -> None:
    """Writes one safetensors file; arguments and errors as in `write_sharded`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {
            "dtype": _DTYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the file: the data starts aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec in specs:
            value = np.asarray(load(spec))
            if value.shape != spec.shape:
                raise ValueError(f"{spec.name} has shape {value.shape}, not {spec.shape}")
            stored = np.ascontiguousarray(value.astype(_DTYPES[spec.dtype][1]))
            if not np.isfinite(stored).all():
                raise ValueError(f"{spec.name} holds NaN or infinity")
            file.write(stored.data.cast("B") if stored.dtype == np.float32 else stored.tobytes())


def _split(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if shard and size + spec.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.nbytes
    if shard:
        yield shard
