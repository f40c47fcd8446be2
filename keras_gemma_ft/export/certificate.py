"""What makes an export trustworthy: read back from disk, it is the tuned model.

The exported files are opened anew. Each weight must be the tuned one, rounded to the type it is stored in;
and a few rows of tokens must get the same logits from the merged weights as from the base with its adapters
beside it. An export that fails is not written.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.staging import CERTIFICATE
from keras_gemma_ft.export.tuned import Tuned
from keras_gemma_ft.json_files import write_json
from keras_gemma_ft.model import streaming
from keras_gemma_ft.model.loading import Source
from keras_gemma_ft.model.weights import table

LIMIT = 1e-4
"""What the float32 logits of the median token may differ by, relative to the largest logit. Sums in another
order make 1e-6 of it. Where a norm divides by almost nothing a token's rounding grows a thousandfold, which
says nothing about the export: so the limit is on the median, and the largest is reported beside it."""
ROWS, LENGTH = 4, 32
# Half a unit in the last place, relative to the value.
_ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_COMPARED_AT_ONCE = 2**22  # values


def certify(
    directory: Path,
    exported: Source,
    tuned: Tuned,
    about: Mapping[str, Any],
    weights: Mapping[str, Any],
    *,
    lossless: bool,
) -> dict[str, Any]:
    """Compares logits, and writes certificate.json.

    Args:
        directory: The export, complete but for the certificate.
        exported: Reads the merged weights from there.
        tuned: The model that was exported.
        about: What the certificate says besides: the format, the base, the run.
        weights: How the weights were compared, and what came out.
        lossless: Whether the export holds the merged weights in float32. If not, the merging is proven in
            memory, and what the rounding does to logits is reported: there is no limit on it, because the
            weights are the nearest that their type has.

    Returns:
        The certificate.

    Raises:
        UserError: The comparison fails.
    """
    tokens = token_rows(tuned)
    live = streaming.logits(tuned.unmerged, tokens, tuned.adapters, tuned.scale)
    if not np.isfinite(live).all():
        raise UserError(
            "the tuned model gives logits that are not finite; nothing was exported",
            where="the checkpoint",
            remedy="export another one (--which), or train again with a lower train.learning_rate.",
        )
    stored = streaming.logits(exported, tokens)
    merged = stored if lossless else streaming.logits(tuned, tokens)
    parity = {"limit": LIMIT, **_difference(merged, live)}
    error = parity["median_relative_error"]
    if not error <= LIMIT:
        raise refused(
            f"merged and adapted logits differ by {error:.2g} of the largest logit; {LIMIT:g} is allowed"
        )
    certificate = {
        **about,
        "parity": {
            "compared": f"float32 logits of {ROWS} rows of {LENGTH} tokens, computed by keras_gemma_ft",
            "merged_and_adapted": parity,
            "stored_and_adapted": _difference(stored, live),
            "base_and_adapted": _difference(streaming.logits(tuned.base, tokens), live),
        },
        "weights": dict(weights),
        "versions": _versions(),
        "files": _files(directory),
    }
    write_json(directory / CERTIFICATE, certificate)
    return certificate


def token_rows(source: Source) -> np.ndarray:
    """Rows to compare logits on, int32 [ROWS, LENGTH]: `<bos>`, then tokens at random, always the same."""
    config = source.config
    size = min(config.vocab_size, config.vocab_size_per_layer_input or config.vocab_size)
    rows = np.random.default_rng(0).integers(0, size, (ROWS, LENGTH), np.int32)
    rows[:, 0] = config.bos_token_id
    return rows


def summary(certificate: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    parity = certificate["parity"]
    merged, stored = parity["merged_and_adapted"], parity["stored_and_adapted"]
    line = f"logits equal to {merged['median_relative_error']:.1g}"
    if stored["median_relative_error"] > LIMIT:
        line += (
            f" as merged, to {stored['median_relative_error']:.1g} as stored in {certificate['dtype']} "
            f"(same token first in {stored['argmax_agreement']:.0%})"
        )
    return f"{line}; tuning moved them by {parity['base_and_adapted']['median_relative_error']:.1g}"


def compare_weights(exported: Source, tuned: Tuned, max_error: float = 0.0) -> dict[str, Any]:
    """Every weight read back is the tuned one: the same bits, or where it was merged, its nearest neighbour.

    Args:
        exported: Reads the weights from the export.
        tuned: The model that was exported.
        max_error: What a weight may differ by besides, relative to the largest of its matrix: for formats
            that quantize.

    Raises:
        UserError: One is not; the message names it.
    """
    parts = merged_parts = 0
    for weight in table(tuned.config).values():
        merged = tuned.is_merged(weight)
        # A merged weight is computed anew here, and a product may be summed in another order.
        slack = max_error + (1e-6 if merged else 0.0)
        for index in np.ndindex(weight.layers.shape) if weight.in_layers else [()]:
            stored, expected = np.asarray(exported.part(weight, index)), tuned.part(weight, index)
            parts += 1
            merged_parts += merged
            allowed = slack * float(np.max(np.abs(expected))) if slack else 0.0
            for rows in _pieces(weight.shape):
                if not _same(stored[rows], expected[rows], allowed):
                    raise refused(f"{weight.name}{list(index)} is not what was to be written")
    return {"compared": parts, "merged": merged_parts, "as_intended": True}


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a large matrix, some at a time."""
    step = max(1, _COMPARED_AT_ONCE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _same(stored: np.ndarray, expected: np.ndarray, allowed: float) -> bool:
    if not allowed:
        return bool(np.array_equal(stored, expected.astype(stored.dtype)))
    rounding = _ROUNDING[str(stored.dtype)]
    stored, expected = stored.astype(np.float32), expected.astype(np.float32)
    return bool(np.all(np.abs(stored - expected) <= rounding * np.abs(expected) + allowed))


def _difference(ours: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Each token's largest difference, relative to the largest logit; how often the same token is first."""
    errors = np.max(np.abs(ours - reference), axis=-1) / max(float(np.max(np.abs(reference))), 1e-30)
    return {
        "median_relative_error": float(np.median(errors)),
        "max_relative_error": float(np.max(errors)),
        "argmax_agreement": float(np.mean(np.argmax(ours, -1) == np.argmax(reference, -1))),
    }


def _versions() -> dict[str, str]:
    import jax

    from keras_gemma_ft import __version__

    return {
        "keras_gemma_ft": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def refused(what: str) -> UserError:
    return UserError(
        what,
        where="the parity certificate",
        remedy="nothing was exported. If it happens again, it is a fault of keras_gemma_ft: report it.",
    )
