"""A merged Hugging Face directory as one GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from keras_gemma_ft.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
OUTPUT_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")


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
