"""What to change after a verdict, in the order of the fine-tuning guide, with the user's own numbers."""

from __future__ import annotations

import math

from keras_gemma_ft.advice import GUIDE, Settings, number
from keras_gemma_ft.config import DATASET_SIZES


def remedies(kind: str, settings: Settings, *, best_step: int | None = None, step: int = 0) -> list[str]:
    """What to change after a verdict, in the guide's order; empty where nothing is wrong.

    Args:
        kind: A verdict of `overfitting.KINDS`.
        settings: The user's numbers.
        best_step: Where the held-out loss was best.
        step: Where the run is.
    """
    if kind in ("overfitting", "memorizing"):
        return [*_fewer_epochs(settings, best_step, step), *_against_overfitting(settings)]
    if kind == "underfitting":
        return _against_underfitting(settings)
    if kind == "diverged":
        return _against_divergence(settings)
    if kind == "plateau":
        return [
            f"More steps bring little: stop here (step {step:,}), or try more varied data before more epochs."
        ]
    return []


def _fewer_epochs(settings: Settings, best_step: int | None, step: int) -> list[str]:
    epochs, per_epoch = settings.epochs, settings.steps_per_epoch
    if best_step is None:
        return ["Train fewer epochs." if epochs is None else f"Train fewer than {number(epochs)} epochs."]
    if not per_epoch or not epochs:
        return [f"Train fewer epochs: the held-out loss was best at step {best_step:,}."]
    reached = best_step / per_epoch
    fewer = max(1, math.ceil(reached - 0.1))  # a best just after an epoch's end belongs to that epoch
    if fewer >= epochs and 0 < step <= best_step:  # the end of the run was its best
        return []
    if fewer >= epochs:
        return [
            f"Stop earlier: the held-out loss was best at step {best_step:,}, after {reached:.1f} epochs."
        ]
    plural = "" if fewer == 1 else "s"
    return [
        f"Train {fewer} epoch{plural} instead of {number(epochs)}: the held-out loss was best after "
        f"{reached:.1f}."
    ]


def _against_overfitting(settings: Settings) -> list[str]:
    texts = []
    adapter = settings.method != "full"
    if adapter and settings.dropout is not None and settings.dropout < 0.2:
        more = min(0.2, max(0.1, 2 * settings.dropout))
        texts.append(f"Raise lora.dropout from {number(settings.dropout)} to {number(more)}.")
    low, high = DATASET_SIZES[settings.purpose]
    rows = "" if settings.rows is None else f": it has {settings.rows:,} rows"
    recommended = f"; {low:,} to {high:,} are recommended" if (settings.rows or 0) < low else ""
    texts.append(f"Add more diverse data to the training set{rows}{recommended}.")
    if not adapter:
        texts.append("Train an adapter (method='lora') instead of every weight.")
    elif settings.rank is not None and settings.rank > 4:
        lower = settings.rank // 2
        texts.append(f"Lower lora.rank from {settings.rank} to {lower}, and lora.alpha to {2 * lower}.")
    return texts


def _against_underfitting(settings: Settings) -> list[str]:
    texts = [
        "Look at the loss mask of a few rows with `keras-gemma-ft data`: are the answers what is trained?"
    ]
    rate, ceiling = settings.learning_rate, GUIDE["train.learning_rate"].high
    if rate is not None and rate < ceiling:
        texts.append(f"Raise train.learning_rate from {rate:g} to {min(ceiling, 3 * rate):g}.")
    if settings.epochs is not None and settings.epochs < 5:
        texts.append(
            f"Train {number(min(5, 2 * settings.epochs))} epochs instead of {number(settings.epochs)}."
        )
    if settings.method != "full" and settings.rank is not None and settings.rank < 64:
        texts.append(f"Raise lora.rank from {settings.rank} to {min(64, 2 * settings.rank)}.")
    return texts


def _against_divergence(settings: Settings) -> list[str]:
    texts = []
    if settings.learning_rate is not None:
        texts.append(
            f"Lower train.learning_rate from {settings.learning_rate:g} to {settings.learning_rate / 3:.2g}."
        )
    if settings.warmup_ratio is not None and settings.warmup_ratio < 0.1:
        texts.append(f"Raise train.warmup_ratio from {number(settings.warmup_ratio)} to 0.1.")
    return [*texts, "Set train.clip_norm to 1.0 or less."]
