"""Where a preset's files are: in this package, in a local directory, or fetched from a hub into its cache.

resolve_preset("gemma4_tiny")                        # comes with the package
resolve_preset("models/gemma-4-E2B-it")              # a local directory, Hugging Face's or KerasHub's
resolve_preset("hf://google/gemma-4-E2B-it")         # from the Hugging Face Hub
resolve_preset("gemma4_instruct_4b")                 # by KerasHub's name, from Kaggle
resolve_preset("kaggle://keras/gemma4/keras/gemma4_instruct_4b/2")
"""

from __future__ import annotations

import difflib
import importlib.util
import runpy
from collections.abc import Callable
from pathlib import Path

from keras_gemma_ft.errors import UserError

_HERE = Path(__file__).parent
# The demo's rows, train.jsonl and held_out.jsonl: messages to a town hall, and the office that answers.
DEMO = _HERE / "demo"
_HF, _KAGGLE = "hf://", "kaggle://"
# What a preset consists of on the Hugging Face Hub; repositories also hold originals in other formats.
_HF_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.h5", "assets/*")


def embedded_presets() -> dict[str, Path]:
    """The presets that come with the package: name to directory."""
    return {path.parent.name: path.parent for path in sorted(_HERE.glob("*/config.json"))}


def keras_hub_presets() -> dict[str, str]:
    """KerasHub's Gemma 4 presets: name to `kaggle://` handle; none where KerasHub is not installed."""
    package = importlib.util.find_spec("keras_hub")
    if package is None or package.origin is None:
        return {}
    # The table is a file of plain data; importing the package for it would take 8 s.
    table = Path(package.origin).parent / "src/models/gemma4/gemma4_presets.py"
    presets = runpy.run_path(str(table))["backbone_presets"] if table.is_file() else {}
    # An assistant is a draft model for another one's decoding, no decoder of its own.
    return {
        name: about["kaggle_handle"] for name, about in presets.items() if not name.endswith("_assistant")
    }


def resolve_preset(preset: str) -> Path:
    """The directory with a preset's `config.json`, vocabulary and weights.

    Args:
        preset: The name of an embedded preset, a local directory, `hf://ORG/NAME`, a KerasHub name, or a
            `kaggle://` handle. An embedded name wins over a directory of that name: write `./NAME` for that.

    Raises:
        UserError: There is no such preset, it is no preset, or it cannot be fetched.
    """
    embedded = embedded_presets()
    if preset in embedded:
        return embedded[preset]
    if preset.startswith(_HF):
        return _checked(_from_hugging_face(preset), preset)
    if preset.startswith(_KAGGLE):
        return _checked(_from_kaggle(preset, preset), preset)
    directory = Path(preset).expanduser()
    if directory.is_dir():
        return _checked(directory, preset)
    if directory.is_file():
        raise UserError(
            "is a file, not a preset's directory",
            where=f"preset={preset}",
            remedy=f"give the directory: {directory.parent}",
        )
    published = keras_hub_presets()
    if preset in published:
        return _checked(_from_kaggle(published[preset], preset), preset)
    names = [*embedded, *published]
    near = difflib.get_close_matches(preset, names, 3, 0.6)
    raise UserError(
        "there is no such preset",
        where=f"preset={preset}",
        remedy=f"did you mean {' or '.join(near)}?"
        if near
        else f"give a local directory, hf://ORG/NAME, or one of {', '.join(names)}.",
    )


def _checked(directory: Path, preset: str) -> Path:
    if not (directory / "config.json").is_file():
        raise UserError(
            "holds no preset: there is no config.json",
            where=f"preset={preset}",
            remedy="give the directory with the config.json, vocabulary and weights of a Gemma 4 model.",
        )
    return directory


def _from_hugging_face(preset: str) -> Path:
    repository = preset.removeprefix(_HF).strip("/")
    if repository.count("/") != 1:
        raise UserError(
            "is no handle of a model on the Hugging Face Hub",
            where=f"preset={preset}",
            remedy="write hf://ORG/NAME.",
        )
    try:
        import huggingface_hub
    except ImportError:
        raise _missing("huggingface_hub", preset) from None
    return _fetched(
        lambda: huggingface_hub.snapshot_download(repository, allow_patterns=list(_HF_FILES)),
        preset,
        "huggingface.co, and that its terms are accepted and `hf auth login` was run",
    )


def _from_kaggle(handle: str, preset: str) -> Path:
    try:
        import kagglehub
    except ImportError:
        raise _missing("kagglehub", preset) from None
    return _fetched(
        lambda: kagglehub.model_download(handle.removeprefix(_KAGGLE)),
        preset,
        "kaggle.com, and that its terms are accepted and KAGGLE_API_TOKEN is set",
    )


def _fetched(fetch: Callable[[], str], preset: str, site: str) -> Path:
    try:
        return Path(fetch())
    except Exception as error:  # each library has a dozen kinds for "not there", "not allowed", "no network"
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot be fetched: {message}", where=f"preset={preset}", remedy=f"check the name on {site}."
        ) from error


def _missing(library: str, preset: str) -> UserError:
    return UserError(
        f"the library {library} is not installed",
        where=f"preset={preset}",
        remedy=f"pip install {library}, or give a local directory.",
    )
