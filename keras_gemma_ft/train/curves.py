"""Loss curves and what can be read off them despite their noise: levels, slopes, and the errors of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# The standard error of a median of normal values, relative to their mean's.
_MEDIAN = math.sqrt(math.pi / 2)


@dataclass(frozen=True)
class Curve:
    """A loss over steps; steps increase.

    Attributes:
        steps: int or float `[points]`.
        losses: float `[points]`, nats a token.
    """

    steps: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, points: Sequence[tuple[int, float]]) -> Curve:
        """From `(step, loss)` pairs; of two at one step, as a resumed run gives them, the last counts."""
        latest = sorted(dict(points).items())
        return cls(
            np.array([step for step, _ in latest], np.float64),
            np.array([loss for _, loss in latest], np.float64),
        )

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Slope:
    """A least-squares slope over the last part of a curve, nats per step, with its standard error."""

    value: float
    error: float
    points: int

    def __str__(self) -> str:
        text = f"{1000 * self.value:+.3g} ± {1000 * self.error:.2g} per 1,000 steps"
        return text.replace("-", "−")


def slope(curve: Curve, since: float) -> Slope | None:
    """The least-squares slope from step `since` on, over three points at least: None where there are fewer.

    No more than three are insisted on: in a short run the fourth from last is often the untrained model.

    The standard error is that of the residuals with n − 2 degrees of freedom, which supposes
    independent noise.
    """
    if len(curve) < 3:
        return None
    chosen = curve.steps >= min(since, curve.steps[-3])
    x, y = curve.steps[chosen], curve.losses[chosen]
    x = x - x.mean()
    spread = float(x @ x)
    value = float(x @ y) / spread
    residuals = y - y.mean() - value * x
    error = math.sqrt(float(residuals @ residuals) / max(1, len(x) - 2) / spread)
    return Slope(value, error, len(x))


def when_spent(share: float, train: Curve, learning_rates: Curve | None) -> float:
    """The step at which a share of the run is spent: of its steps, or of its learning rate."""
    steps = train.steps
    if learning_rates is not None and len(learning_rates):
        sums = np.cumsum(np.interp(steps, learning_rates.steps, learning_rates.losses))
        if sums[-1] > 0:
            return float(steps[np.searchsorted(sums, share * sums[-1])])
    return float(steps[0] + share * (steps[-1] - steps[0]))


def recent_falls(curve: Curve, early: float, since: float, *, whole: float, now: float) -> dict[str, Any]:
    """What the fitted line fell since a step, as a share of three things; 0 where that cannot be said.

    Args:
        curve: The losses.
        early: A step after the first, steep ones.
        since: Where the recent part begins.
        whole: The fall of the whole run.
        now: The present level.

    Returns:
        `recent_fall`: of the whole. `late_fall`: of the fall since `early`. `level_fall`: of `now`.
    """
    fitted = slope(curve, since)
    fallen = 0.0 if fitted is None else -fitted.value * float(curve.steps[-1] - since)
    place = min(int(np.searchsorted(curve.steps, early)), len(curve) - 1)
    width = int(np.clip(len(curve) // 20, 1, 20))
    late = float(np.median(curve.losses[place : place + width])) - now
    shares = {"recent_fall": whole, "late_fall": late, "level_fall": now}
    return {name: fallen / size if size > 0 else 0.0 for name, size in shares.items()}


@dataclass(frozen=True)
class Levels:
    """Best and present level of a curve, and the standard error of their difference."""

    best: float
    best_index: int
    now: float
    error: float

    @property
    def rise(self) -> float:
        return self.now - self.best


def train_levels(curve: Curve) -> Levels:
    """Running medians over a tenth of the points: a batch with an extreme loss is no change of level."""
    width = int(np.clip(len(curve) // 10, 5, 50))
    return _levels(curve, min(width, len(curve)), np.median, _MEDIAN)


def held_out_levels(curve: Curve) -> Levels:
    """Running means over a fifth of the points, at most 8: each is over the same rows, with less noise."""
    return _levels(curve, int(np.clip(len(curve) // 5, 1, 8)), np.mean, 1.0)


def _levels(curve: Curve, width: int, average: Any, inefficiency: float) -> Levels:
    windows = np.lib.stride_tricks.sliding_window_view(curve.losses, width)
    levels = average(windows, axis=-1)
    best = int(np.argmin(levels))
    # Each level has an error of noise / √width, and windows that do not overlap are independent. The noise is
    # that of the later half: in a run of few points the first fall would pass for it.
    later = curve.losses[-max(3, len(curve) // 2) :]
    error = inefficiency * _noise(later) * math.sqrt(2 / width)
    return Levels(float(levels[best]), best + width // 2, float(levels[-1]), error)


def _noise(losses: np.ndarray) -> float:
    """The standard deviation of a point, from second differences, which a smooth trend hardly touches.

    Their median absolute value is robust against spikes: 0.6745 σ√6 for normal noise.
    """
    if len(losses) < 3:
        return 0.0
    return float(np.median(np.abs(np.diff(losses, 2))) / (0.6745 * math.sqrt(6)))


def first_loss(train: Curve) -> tuple[float, float]:
    """Where the training loss began, the median of a few first points, and its standard error."""
    points = min(len(train), int(np.clip(len(train) // 20, 3, 20)))
    return float(np.median(train.losses[:points])), _MEDIAN * _noise(train.losses) / math.sqrt(points)
