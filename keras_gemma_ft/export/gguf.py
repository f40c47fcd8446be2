"""A tuned model as one GGUF file, by llama.cpp's own converter, read back by llama.cpp's own reader."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.certificate import certify, compare_weights, refused
from keras_gemma_ft.export.hf import write_hf
from keras_gemma_ft.export.staging import staged
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.weights import Weight

CONVERTER = "convert_hf_to_gguf.py"
OUTPUT_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
FILE = "model.gguf"
# What 8 bits lose of a value, relative to the largest beside it: half a step of max / 127, whose scale itself
# has 16 bits.
_LOSS_OF_Q8_0 = 0.5 / 127 + 2.0**-11


def export_gguf(
    target: str | Path,
    tuned: Tuned,
    write_tokenizer: Callable[[Path], Any],
    converter: Path,
    output_type: str = "auto",
    about: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes model.gguf with its certificate.

    The certificate compares the weights in the file; the hyperparameters and the vocabulary are what the
    converter makes of config.json and tokenizer.json.

    Args:
        target: The directory; an earlier export there is replaced.
        tuned, write_tokenizer, about, dtype: As for `export_hf`, for the directory that is converted.
        converter, output_type: As for `convert`.

    Returns:
        The certificate.

    Raises:
        UserError: As for `export_hf` and `convert`; then nothing is left behind.
    """
    with staged(target) as directory:
        hf = directory / "hf"
        hf.mkdir()
        merged = write_hf(hf, tuned, write_tokenizer, dtype or tuned.dtype)
        compare_weights(merged, tuned)
        convert(hf, directory / FILE, converter, output_type)
        exported = GgufSource(directory / FILE, tuned.config, converter)
        loss = _LOSS_OF_Q8_0 if output_type == "q8_0" else 0.0
        weights = compare_weights(exported, Tuned(merged, {}, None), loss)
        shutil.rmtree(hf)
        described = {"format": "gguf", "dtype": exported.dtype, **(about or {})}
        return certify(directory, exported, tuned, described, weights, lossless=False)


def find_converter(llama_cpp: str | Path | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """The converter's path: of `llama_cpp`, else of the variable LLAMA_CPP, else on PATH.

    Args:
        llama_cpp: A checkout of llama.cpp, or the script itself.
        environment: Where the variables are read.

    Raises:
        UserError: There is none, or `llama_cpp` has none.
    """
    named = llama_cpp or environment.get("LLAMA_CPP")
    if named:
        path = Path(named)
        path = path / CONVERTER if path.is_dir() else path
        if path.is_file():
            return path
        raise UserError(
            f"there is no {CONVERTER}",
            where=str(named),
            remedy="name a checkout of llama.cpp, or the script itself.",
        )
    found = shutil.which(CONVERTER, path=environment.get("PATH", ""))
    if found:
        return Path(found)
    raise UserError(
        "a GGUF file is written by llama.cpp's converter, which is not here",
        where="--format=gguf",
        remedy="git clone https://github.com/ggml-org/llama.cpp and give --llama_cpp=DIR, or set LLAMA_CPP.",
    )


def convert(hf_directory: Path, outfile: Path, converter: Path, output_type: str = "auto") -> None:
    """Runs the converter with this Python, which needs torch, transformers and gguf for it.

    Args:
        hf_directory: A merged export: weights, config.json and tokenizer files.
        outfile: The file to write; it is there whole or not at all.
        converter: llama.cpp's `convert_hf_to_gguf.py`.
        output_type: One of `OUTPUT_TYPES`; `auto` keeps 16-bit weights as they are. llama.cpp's
            `llama-quantize` makes smaller quantizations from the file.

    Raises:
        UserError: The converter fails; the message holds its last line.
    """
    if output_type not in OUTPUT_TYPES:
        raise UserError(
            f"{output_type!r} is no type of weights that the converter writes",
            where="--gguf_type",
            remedy=f"choose one of {', '.join(OUTPUT_TYPES)}.",
        )
    partial = outfile.with_name(f".{outfile.name}.partial")
    command: list[str | Path] = [sys.executable, converter, hf_directory]
    command += ["--outfile", partial, "--outtype", output_type]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not partial.is_file():
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            raise UserError(
                f"llama.cpp's converter failed: {lines[-1] if lines else 'it says nothing'}",
                where=str(converter),
                remedy="it needs torch, transformers and gguf in this environment; see its requirements.txt.",
            )
        partial.rename(outfile)
    finally:
        partial.unlink(missing_ok=True)


class GgufSource:
    """The weights in a GGUF file, read by llama.cpp's Python package `gguf`.

    Args:
        path: The file.
        config: Of the decoder: the file's own hyperparameters are not read.
        converter: Beside it llama.cpp keeps `gguf`; else an installed one is used.

    Raises:
        UserError: `gguf` is not there, or a weight is missing in the file.
    """

    def __init__(self, path: Path, config: Gemma4Config, converter: Path) -> None:
        self.config = config
        self.ignored: tuple[str, ...] = ()
        self._gguf = _import_gguf(converter)
        self._tensors = {tensor.name: tensor for tensor in self._gguf.GGUFReader(path).tensors}
        self.dtype = self._tensors["token_embd.weight"].tensor_type.name.lower()

    def part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        name = weight.gguf_name(index)
        if name not in self._tensors:
            raise refused(f"the converter left {name} out")
        tensor = self._tensors[name]
        data, kind = tensor.data, tensor.tensor_type.name
        if kind == "BF16":
            data = data.view(ml_dtypes.bfloat16)
        elif kind not in ("F32", "F16"):
            data = self._gguf.quants.dequantize(data, tensor.tensor_type)
        return data.reshape(weight.shape)


def _import_gguf(converter: Path) -> Any:
    beside = str(converter.parent / "gguf-py")
    sys.path.insert(0, beside)
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            f"the file cannot be read back to certify it: {error}",
            where="--format=gguf",
            remedy="pip install gguf, or give a whole checkout of llama.cpp with --llama_cpp=DIR.",
        ) from error
    finally:
        sys.path.remove(beside)
