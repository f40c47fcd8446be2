"""Numbers with intervals: bootstrap confidence intervals and paired tests between two models.

Every metric here is a function of *sums over rows*: accuracy is Σ correct ÷ Σ 1, macro F1 a function of the
summed counts of each class, BLEU of the summed n-gram matches. So a bootstrap resample is one product of
resampling counts `[resamples, rows]` with statistics `[rows, columns]`, and no metric is ever recomputed
from text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# A block of resampling counts holds at most this many numbers (32 MiB), whatever the number of rows.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Metric:
    """A number over a set of rows, kept as what each row adds to it.

    Attributes:
        name: The key in `evaluation.json` ("macro_f1").
        title: What a table calls it ("macro F1").
        rows: float64 `[rows, columns]`, what each row contributes.
        combine: Maps summed columns `[..., columns]` to values `[...]`.
        better: Which direction is an improvement.
        binary: True where each row is simply right or wrong (one column of 0 and 1 and one of ones): the
            paired test is then McNemar's.
    """

    name: str
    title: str
    rows: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    better: Literal["higher", "lower"] = "higher"
    binary: bool = False

    @property
    def value(self) -> float:
        return float(self.combine(self.rows.sum(axis=0)))


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One metric for the tuned model and, where there is one, for its base.

    Attributes:
        base: The base model's value; None without a base.
        tuned: The tuned model's value.
        difference: tuned − base, with the interval of the *paired* difference; None without a base.
        p_value: Two-sided, that a difference this large arises by chance; None without a base.
        test: Which test gave `p_value`.
    """

    name: str
    title: str
    better: Literal["higher", "lower"]
    base: Interval | None
    tuned: Interval
    difference: Interval | None = None
    p_value: float | None = None
    test: str | None = None


def mean_metric(name: str, title: str, values: Sequence[float], *, binary: bool = False) -> Metric:
    """The mean of one number per row; with `binary`, a share of rows that are right."""
    column = np.asarray(values, np.float64)
    return Metric(name, title, np.stack([column, np.ones_like(column)], axis=1), _ratio, binary=binary)


def ratio_metric(
    name: str,
    title: str,
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    *,
    better: Literal["higher", "lower"] = "higher",
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Metric:
    """Σ numerators ÷ Σ denominators, then `transform` (for example `np.exp`: perplexity from losses)."""
    rows = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
    combine = _ratio if transform is None else lambda sums: transform(_ratio(sums))
    return Metric(name, title, rows, combine, better=better)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient in which x ÷ 0 is 0, as scikit-learn's `zero_division=0`."""
    numerator, denominator = np.broadcast_arrays(
        np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    )
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return divide(sums[..., 0], sums[..., 1])


def resample(metrics: Sequence[Metric], *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Bootstrap values of several metrics over the *same* resampled rows, so that they compare in pairs.

    Args:
        metrics: Metrics over the same rows in the same order.
        resamples: How many times to draw as many rows as there are, with replacement.
        seed: Of the draws.

    Returns:
        float64 `[len(metrics), resamples]`.

    Raises:
        ValueError: There are no rows, or the metrics have different numbers of rows.
    """
    counts = {metric.rows.shape[0] for metric in metrics}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"metrics over {sorted(counts)} rows cannot be resampled together")
    (rows,) = counts
    generator = np.random.default_rng(seed)
    values = np.empty((len(metrics), resamples))
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)
        for index, metric in enumerate(metrics):
            values[index, start : start + size] = metric.combine(weights @ metric.rows)
    return values


def mcnemar(base_correct: np.ndarray, tuned_correct: np.ndarray) -> float:
    """The exact two-sided McNemar test: bool `[rows]` twice → p-value.

    Only rows on which the models disagree count: under the null hypothesis each is a fair coin (McNemar
    1947).
    """
    from scipy.stats import binomtest

    base_correct, tuned_correct = np.asarray(base_correct, bool), np.asarray(tuned_correct, bool)
    gained = int((~base_correct & tuned_correct).sum())
    lost = int((base_correct & ~tuned_correct).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def compare(
    base: Sequence[Metric] | None,
    tuned: Sequence[Metric],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Comparison]:
    """Each metric of `tuned` with its interval, and against the metric of the same name in `base`.

    Args:
        base: The base model's metrics over the same rows; None where there is no base.
        tuned: The tuned model's metrics.
        confidence: Of the intervals.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    metrics = [*tuned, *(base or ())]
    samples = dict(zip(map(id, metrics), resample(metrics, resamples=resamples, seed=seed), strict=True))
    bases = {metric.name: metric for metric in base or ()}
    tail = 100 * (1 - confidence) / 2

    def interval(value: float, sample: np.ndarray) -> Interval:
        low, high = np.percentile(sample, [tail, 100 - tail])
        return Interval(value, float(low), float(high))

    compared = []
    for metric in tuned:
        ours = interval(metric.value, samples[id(metric)])
        other = bases.get(metric.name)
        if other is None:
            compared.append(Comparison(metric.name, metric.title, metric.better, None, ours))
            continue
        differences = samples[id(metric)] - samples[id(other)]
        if metric.binary:
            p_value, test = mcnemar(other.rows[:, 0], metric.rows[:, 0]), "McNemar, exact"
        else:
            p_value, test = _paired_p_value(differences), "paired bootstrap"
        compared.append(
            Comparison(
                metric.name,
                metric.title,
                metric.better,
                interval(other.value, samples[id(other)]),
                ours,
                interval(metric.value - other.value, differences),
                p_value,
                test,
            )
        )
    return compared


def _paired_p_value(differences: np.ndarray) -> float:
    """Twice the smaller share of resamples on either side of zero; never 0, as the resamples are finite."""
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (differences.size + 1)))
