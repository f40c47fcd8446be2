"""Advice before training: settings and dataset sizes outside what the fine-tuning guide recommends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_gemma_ft.config import DATASET_SIZES


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        about: The config field or the part of the results it concerns.
        text: One sentence or two: what was found, why it matters, what to do.
    """

    about: str
    text: str


@dataclass(frozen=True)
class Settings:
    """The user's numbers, as far as they are known.

    Attributes:
        method: "lora", "qlora" or "full".
        rank, alpha, dropout: Of the adapter.
        learning_rate: The peak.
        epochs: Over the training rows.
        batch_size: Rows per update, after accumulation.
        warmup_ratio: Share of the steps over which the learning rate rises.
        rows: Training rows.
        steps_per_epoch: Updates per epoch.
        purpose: A key of `keras_gemma_ft.config.DATASET_SIZES`.
    """

    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    batch_size: int | None = None
    warmup_ratio: float | None = None
    rows: int | None = None
    steps_per_epoch: int | None = None
    purpose: str = "task-specific"

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, rows: int | None = None, steps_per_epoch: int | None = None
    ) -> Settings:
        """Reads the fields of a config (a ConfigDict, or what config.json holds); missing ones stay unknown.

        Free text is taken for instruction tuning, anything with a checkable answer for one task.
        """
        lora, train, task = (config.get(name) or {} for name in ("lora", "train", "task"))
        free_text = task.get("kind") in ("generation", "instructions")
        return cls(
            method=config.get("method") or "lora",
            rank=lora.get("rank"),
            alpha=lora.get("alpha"),
            dropout=lora.get("dropout"),
            learning_rate=train.get("learning_rate"),
            epochs=train.get("epochs"),
            batch_size=train.get("batch_size"),
            warmup_ratio=train.get("warmup_ratio"),
            rows=rows,
            steps_per_epoch=steps_per_epoch,
            purpose="instruction tuning" if free_text else "task-specific",
        )


@dataclass(frozen=True)
class Range:
    """A recommended range, and why it has its ends."""

    low: float
    high: float
    below: str
    above: str
    adapter_only: bool = False


# What the fine-tuning guide recommends, by config field. Its dropout is 0.05; up to 0.1 is its own remedy
# against overfitting. Its learning rates are meant for adapters.
GUIDE: Mapping[str, Range] = {
    "lora.rank": Range(
        16,
        64,
        "so small an adapter may not hold the task",
        "it costs memory and overfits sooner",
        adapter_only=True,
    ),
    "lora.dropout": Range(
        0.05, 0.1, "less guards against overfitting", "more slows learning", adapter_only=True
    ),
    "train.learning_rate": Range(
        1e-4, 3e-4, "training may end before much is learned", "training may diverge", adapter_only=True
    ),
    "train.epochs": Range(1, 5, "some rows are never seen", "the model begins to memorize its training rows"),
    "train.batch_size": Range(4, 16, "gradients are noisy", "the same rows give few updates"),
    "train.warmup_ratio": Range(
        0.05, 0.1, "the first updates are large", "much of the run passes at a low learning rate"
    ),
}


def before_training(settings: Settings) -> list[Advice]:
    """What lies outside the guide's ranges, each once, in the order of the config."""
    advice = []
    adapter = settings.method != "full"
    for name, recommended in GUIDE.items():
        value = getattr(settings, name.split(".")[1])
        if value is None or (recommended.adapter_only and not adapter):
            continue
        if not recommended.low <= value <= recommended.high:
            reason = recommended.below if value < recommended.low else recommended.above
            advice.append(
                Advice(name, f"{number(value)} is outside the recommended {_range(recommended)}: {reason}.")
            )
        if name == "lora.rank" and settings.alpha is not None and settings.alpha != 2 * value:
            advice.append(
                Advice(
                    "lora.alpha",
                    f"{number(settings.alpha)} is not the recommended 2 × rank = {number(2 * value)}: the "
                    f"right learning rate changes with alpha ÷ rank.",
                )
            )
    return advice + _dataset_size(settings)


def _dataset_size(settings: Settings) -> list[Advice]:
    if settings.rows is None:
        return []
    low, high = DATASET_SIZES[settings.purpose]
    wanted = f"the {low:,} to {high:,} recommended for {settings.purpose} tuning"
    if settings.rows < low:
        return [
            Advice(
                "data.train",
                f"{settings.rows:,} rows are fewer than {wanted}: watch the held-out loss for overfitting.",
            )
        ]
    if settings.rows > high:
        return [
            Advice(
                "data.train",
                f"{settings.rows:,} rows are more than {wanted}: fewer epochs, or a sample, may do as well.",
            )
        ]
    return []


def as_lines(advice: Sequence[Advice]) -> list[str]:
    """`about: text`, for the terminal and the report."""
    return [f"{item.about}: {item.text}" for item in advice]


def number(value: float) -> str:
    """A number as people write it: 16, 0.05, 10,000."""
    return f"{value:,g}" if value < 1e6 else f"{value:,.0f}"


def _range(recommended: Range) -> str:
    return f"{number(recommended.low)} to {number(recommended.high)}"
