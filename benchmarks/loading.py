"""Loading a checkpoint into a quantized model, beside reading its files alone, as one JSON object.

    python benchmarks/loading.py --model=e4b --directory=/tmp/e4b     # writes 15 GB of random bfloat16 there
    python benchmarks/loading.py --model=e4b --directory=/tmp/e4b \\
        --quantization=nf4,embedding=nf4,per_layer_embedding=nf4

A directory that holds the checkpoint already is used as it is. Before both measurements the operating system
is asked to forget the files (`posix_fadvise`). Prints

    read_s, load_s          for the bytes of all files; for a model that is ready on the device
    model_gib, peak_gib     of the device; without memory of its own, peak_of says of what
    largest_gib             of the largest stack in bfloat16, by which the peak may exceed the model
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from step import MODELS, decoder, peak_memory, quantization_parts

from keras_gemma_ft import compilation
from keras_gemma_ft.errors import UserError

READ_BYTES = 16 * 2**20
NF4 = quantization_parts("nf4,embedding=nf4")


def write(model: str, directory: Path) -> None:
    """A checkpoint of random weights as Hugging Face's are laid out."""
    import numpy as np

    from keras_gemma_ft.export.shards import TensorSpec, write_sharded
    from keras_gemma_ft.model.weights import table

    config = decoder(model)
    specs = [
        TensorSpec(f"model.language_model.{name}", weight.shape, "bfloat16")
        for weight in table(config).values()
        for _, name in weight.hf_names()
    ]
    values = 0.02 * np.random.default_rng(0).standard_normal(2**22, np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    write_sharded(directory, specs, lambda spec: np.resize(values, spec.shape))
    (directory / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")


def forget(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass


def measure(model: str, directory: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    import jax

    from keras_gemma_ft.model import loading
    from keras_gemma_ft.model.weights import table

    quantized = loading.checked(quantization, decoder(model))
    if not (directory / "config.json").exists():
        write(model, directory)
    files = sorted(directory.glob("*.safetensors"))
    forget(files)
    began = time.perf_counter()
    read(files)
    read_s = time.perf_counter() - began
    forget(files)
    began = time.perf_counter()
    source = loading.open_source(directory)
    if source.config != decoder(model):
        raise UserError(
            f"this is no {model}", str(directory), "give another directory, or the model that it holds."
        )
    weights = dict(loading.load(source, "bfloat16", quantized))
    jax.block_until_ready(weights)
    load_s = time.perf_counter() - began
    matrices = [w for w in table(source.config).values() if w.use in ("matrix", "experts")]
    return {
        "model": model,
        "quantization": quantization,
        "file_gib": round(sum(path.stat().st_size for path in files) / 2**30, 2),
        "read_s": round(read_s, 1),
        "load_s": round(load_s, 1),
        "model_gib": round(sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 2**30, 2),
        "largest_gib": round(max(2 * w.size for w in matrices) / 2**30, 2),
        **peak_memory(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="of the checkpoint")
    parser.add_argument("--quantization", type=quantization_parts, default=NF4)
    given = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    compilation.prepare()
    try:
        print(json.dumps(measure(given.model, given.directory, given.quantization)), flush=True)
    except (UserError, OSError) as error:
        print(f"loading.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
