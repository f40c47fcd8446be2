"""The verb `export`: what a run trained, out of its checkpoint, as files for other software."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from keras_gemma_ft import checkpoint
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export import gguf
from keras_gemma_ft.export.certificate import summary
from keras_gemma_ft.export.hf import export_hf
from keras_gemma_ft.export.peft import export_peft
from keras_gemma_ft.export.preset import Preset
from keras_gemma_ft.export.staging import check_target
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.model.loading import open_source
from keras_gemma_ft.model.lora import LoraConfig

FORMATS = ("hf", "peft", "gguf")
DTYPES = ("float32", "bfloat16", "float16")


def main(
    config: ConfigDict,
    workdir: str | Path,
    formats: str | None = None,
    *,
    out: str | Path | None = None,
    which: str = "best",
    dtype: str | None = None,
    base_model: str | None = None,
    whole: bool | None = None,
    llama_cpp: str | None = None,
    gguf_type: str = "auto",
) -> dict[str, Path]:
    """Exports a run: each format whole, with its certificate, or not at all.

    Args:
        config: Of the run.
        workdir: The run directory.
        formats: Some of `FORMATS`, with commas between; None: hf, and peft where there are adapters.
        out: Gets a directory for each format; None: `export` in the run directory.
        which: "best", "last", or a step.
        dtype: hf, and what gguf is made from: of all weights, one of `DTYPES`; None: the preset's.
        base_model: What PEFT loads beneath the adapters; None: the preset.
        whole: Whether that is a whole Gemma 4 with its towers, where modules have other names; None: as the
            preset is.
        llama_cpp: A checkout of llama.cpp, for gguf.
        gguf_type: One of `gguf.OUTPUT_TYPES`.

    Returns:
        The directory of each format.

    Raises:
        UserError: A fault in an argument, in the run, or in what it trained.
    """
    # ------------------------------------------------------------------ what, from where, to where
    workdir = Path(workdir).expanduser()
    place = workdir / "export" if out is None else Path(out).expanduser()
    if dtype not in (None, *DTYPES):
        raise UserError(
            "weights cannot be stored so",
            where=f"--dtype={dtype}",
            remedy=f"choose from {', '.join(DTYPES)}.",
        )
    targets = {name: place / name for name in _formats(formats, config.method)}
    for target in targets.values():
        check_target(target)
    converter = gguf.find_converter(llama_cpp) if "gguf" in targets else None
    preset = Preset(config.preset)

    # ------------------------------------------------------------------ what was trained
    checkpoints, step = workdir / "checkpoints", _which(which)
    saved = checkpoint.find(checkpoints, step)
    if saved is None:
        raise UserError(
            f"holds no checkpoint{f' of step {step}' if isinstance(step, int) else ''}",
            where=str(checkpoints),
            remedy="train first, or export --which=best or --which=last.",
        )
    source = open_source(preset.directory)
    tuned = Tuned(source, checkpoint.load_weights(checkpoints, saved.step), _lora(config))
    about = _about(config, tuned, saved)
    print(f"step {saved.step} of {workdir}: {_describe(config, tuned)}")

    # ------------------------------------------------------------------ each format
    def write_tokenizer(directory: Path) -> None:
        preset.write_tokenizer(directory, tuned.config)

    def export_gguf(target: Path) -> dict[str, Any]:
        assert converter is not None
        return gguf.export_gguf(target, tuned, write_tokenizer, converter, gguf_type, about, dtype=dtype)

    exports: dict[str, Callable[[Path], dict[str, Any]]] = {
        "hf": lambda target: export_hf(target, tuned, write_tokenizer, about, dtype=dtype),
        "peft": lambda target: export_peft(
            target,
            tuned,
            base_model or preset.hf_name,
            about,
            whole=preset.is_whole if whole is None else whole,
        ),
        "gguf": export_gguf,
    }
    for name, target in targets.items():
        certificate = exports[name](target)
        size = sum(file["bytes"] for file in certificate["files"].values())
        print(f"{name:<4}  {target}  {_bytes(size)}\n      {summary(certificate)}")
    return targets


def _formats(given: str | None, method: str) -> list[str]:
    if given is None:
        return ["hf"] if method == "full" else ["hf", "peft"]
    formats = list(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in formats:
        if name not in FORMATS:
            raise UserError(
                f"{name!r} is no format that can be exported",
                where=f"--format={given}",
                remedy=f"choose from {', '.join(FORMATS)}, with commas between.",
            )
    if method == "full" and "peft" in formats:
        raise UserError(
            "the run trained all weights, so there is no adapter",
            where=f"--format={given}",
            remedy="use --format=hf, which writes the whole model.",
        )
    return formats


def _which(given: str) -> checkpoint.Which | int:
    if given in ("best", "last"):
        return cast(checkpoint.Which, given)
    if given.isdecimal():
        return int(given)
    raise UserError(
        "there is no such checkpoint", where=f"--which={given}", remedy="choose best, last, or a step."
    )


def _lora(config: ConfigDict) -> LoraConfig | None:
    if config.method == "full":
        return None
    lora = config.lora
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    return LoraConfig(lora.rank, alpha, lora.dropout, lora.targets)


def _about(config: ConfigDict, tuned: Tuned, saved: checkpoint.Saved) -> dict[str, Any]:
    return {
        "base": {"preset": config.preset, "dtype": tuned.dtype, "left_out": len(tuned.ignored)},
        "trained": {
            "method": config.method,
            "step": saved.step,
            "held_out_loss": saved.eval_loss,
            "lora": None if tuned.lora is None else tuned.lora.to_json(),
        },
    }


def _describe(config: ConfigDict, tuned: Tuned) -> str:
    if tuned.lora is None:
        text = f"all weights of {config.preset}"
    else:
        text = f"adapters of rank {tuned.lora.rank} on {config.preset}, merged into its {tuned.dtype} weights"
        if config.method == "qlora":
            text += " as published, not as quantized in training"
    if tuned.ignored:
        text += f"; {len(tuned.ignored)} tensors beside the text decoder (towers) are left out"
    return text


def _bytes(size: int) -> str:
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
