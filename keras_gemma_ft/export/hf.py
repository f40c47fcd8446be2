"""A tuned model as a Hugging Face directory that transformers, vLLM and llama.cpp's converter load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.certificate import certify, compare_weights
from keras_gemma_ft.export.shards import TensorSpec, write_sharded
from keras_gemma_ft.export.staging import staged
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.json_files import write_json
from keras_gemma_ft.model.loading import Source, open_source
from keras_gemma_ft.model.weights import TEXT_PREFIX, Weight, table

SHARD_BYTES = 5 * 10**9


def export_hf(
    target: str | Path,
    tuned: Tuned,
    write_tokenizer: Callable[[Path], Any],
    about: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the text decoder, merged, one tensor after the other, with its certificate.

    Args:
        target: The directory; an earlier export there is replaced.
        tuned: The weights.
        write_tokenizer: Puts the tokenizer's files into a directory.
        about: What the certificate is to say besides.
        dtype: Of all weights; None: the base's.
        max_shard_bytes: Largest file of weights.

    Returns:
        The certificate.

    Raises:
        UserError: The target holds other files, the weights are not finite, or the certificate is refused;
            then nothing is left behind.
    """
    dtype = dtype or tuned.dtype
    with staged(target) as directory:
        exported = write_hf(directory, tuned, write_tokenizer, dtype, max_shard_bytes)
        weights = compare_weights(exported, tuned)
        described = {"format": "hf", "dtype": dtype, **(about or {})}
        return certify(directory, exported, tuned, described, weights, lossless=dtype == "float32")


def write_hf(
    directory: Path,
    tuned: Tuned,
    write_tokenizer: Callable[[Path], Any],
    dtype: str,
    max_shard_bytes: int = SHARD_BYTES,
) -> Source:
    """Writes the files into an empty directory; returns what reads them back. Arguments as for `export_hf`.

    Raises:
        UserError: A weight is not finite.
    """
    places = _places(tuned)
    specs = [TensorSpec(name, weight.shape, dtype) for name, (weight, _) in places.items()]
    try:
        write_sharded(directory, specs, lambda spec: tuned.part(*places[spec.name]), max_shard_bytes)
    except ValueError as error:
        raise not_finite(error) from error
    write_json(directory / "config.json", tuned.config.to_hf() | {"dtype": dtype})
    write_tokenizer(directory)
    return open_source(directory)


def not_finite(error: ValueError) -> UserError:
    """A weight that cannot be written."""
    return UserError(
        f"{error}; nothing was exported",
        where="the checkpoint",
        remedy="export another one (--which), or train again with a lower train.learning_rate.",
    )


def _places(tuned: Tuned) -> dict[str, tuple[Weight, tuple[int, ...]]]:
    """Hugging Face's name of every tensor → where it is in ours; whole layers one after the other."""
    named = {
        f"{TEXT_PREFIX}{name}": (weight, index)
        for weight in table(tuned.config).values()
        for index, name in weight.hf_names()
    }

    def layer(name: str) -> int:
        weight, index = named[name]
        return int(weight.layers[index]) if weight.in_layers else -1

    return {name: named[name] for name in sorted(named, key=layer)}
