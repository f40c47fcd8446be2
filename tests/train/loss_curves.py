"""Synthetic loss curves with known labels, noisy as real ones are.

What each label means, in terms of the noiseless curves (T is the run's length, τ the time constant of its
fall):

- warming up: the run ends within its warm-up, or after fewer than 4 held-out measurements;
- healthy: both fall by 20 to 95%, and T is at most 2τ, so they are still falling (both in learning rate
spent);
- plateau: the same with T of 6 to 15τ, so they have stopped, within 20% of each other;
- overfitting: held-out rises 5 to 80% above its best while training goes on falling, or it stops at 2.5 to
20 times the
  training loss;
- memorizing: the same with 60 to 100% of the training answers reproduced and at most 15% of the held-out
ones;
- underfitting: both fall by at most 4%;
- diverged: a loss becomes NaN, or training rises to 1.2 to 4 times its first value, and stays there.

Between these lie curves that people would not agree on (T of 4τ: falling or flat?); they are left out.

The noise: training losses scatter by 3 to 20% from step to step with occasional spikes of two to four times
the loss; held-out losses wander by up to 4% of what they fall. Half of the runs have a cosine schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_gemma_ft.train.curves import Curve
from keras_gemma_ft.train.overfitting import KINDS, Reproduction


@dataclass(frozen=True)
class Case:
    label: str
    train: Curve
    held_out: Curve
    warmup_steps: int
    total_steps: int
    learning_rates: Curve
    reproduction: Reproduction | None = None


def battery(count: int, seed: int) -> list[Case]:
    """`count` cases, the labels in turn."""
    generator = np.random.default_rng(seed)
    return [make(KINDS[index % len(KINDS)], generator) for index in range(count)]


def make(label: str, rng: np.random.Generator) -> Case:
    total = int(rng.integers(60, 2500))
    warmup = int(total * rng.uniform(0, 0.1))
    every = max(1, int(total / rng.integers(8, 60)))
    steps = np.arange(1, total + 1)
    held_steps = np.arange(every if rng.random() < 0.5 else 0, total + 1, every)

    first = rng.uniform(0.8, 4)
    fall = rng.uniform(0, 0.04) if label == "underfitting" else rng.uniform(0.2, 0.95)
    tau = total / (rng.uniform(0.7, 2) if label == "healthy" else rng.uniform(6, 15))
    power = label == "healthy" and rng.random() < 0.4
    grid = np.arange(total + 1)
    rates = np.minimum(grid / max(warmup, 1), 1.0)
    if rng.random() < 0.5:  # cosine: T is then as long as the learning rate spent
        rates = rates * 0.5 * (1 + np.cos(np.pi * np.maximum(grid - warmup, 0) / (total - warmup)))
    spent = np.cumsum(rates) / rates.sum() * total

    def base(step):
        progress = spent[step] / tau
        # A power law never stops falling; both forms have fallen by `fall` at infinity.
        left = (1 + progress) ** -0.7 if power else np.exp(-progress)
        return first * (1 - fall * (1 - left))

    train, held_out = base(steps), base(held_steps)
    held_out = held_out * (1 + rng.uniform(0, 0.15 if label in ("healthy", "plateau") else 0.05))
    reproduction = None

    if label in ("overfitting", "memorizing"):
        train, held_out = _overfit(rng, steps, held_steps, train, held_out, total)
        if label == "memorizing":
            reproduction = _reproduction(rng, rng.uniform(0.6, 1), rng.uniform(0, 0.15))
        elif rng.random() < 0.5:
            share = rng.uniform(0, 0.3)
            reproduction = _reproduction(rng, share, share)
    elif label in ("healthy", "plateau") and rng.random() < 0.3:
        share = rng.uniform(0.7, 1)  # a classifier gives most answers verbatim, held-out ones too
        reproduction = _reproduction(rng, share, share - rng.uniform(0, 0.1))
    elif label == "diverged" and rng.random() < 0.7:
        train, held_out = _diverge(rng, steps, held_steps, train, held_out, total, first)

    scatter = rng.uniform(0.03, 0.2)
    train = train * np.exp(rng.normal(0, scatter, total))
    spikes = rng.random(total) < 0.005
    train[spikes] *= rng.uniform(2, 4, spikes.sum())
    held_out = held_out * np.exp(_wander(rng, len(held_steps), rng.uniform(0.05, 4) / 100 * max(fall, 0.1)))

    if label == "diverged" and np.isfinite(train).all() and train[-1] < 1.05 * first:
        where = rng.integers(total // 3, total)
        train[where:] = np.nan
        held_out[held_steps > where] = np.nan
    if label == "warming up":
        end = min(held_steps[2], total) if rng.random() < 0.5 else warmup
        train, steps = train[: max(end, 3)], steps[: max(end, 3)]
        held_out, held_steps = held_out[held_steps <= end], held_steps[held_steps <= end]
    thin = int(rng.choice([1, 1, 5])) if total > 300 else 1  # some callers log every fifth step
    return Case(
        label,
        Curve(steps[::thin].astype(float), train[::thin]),
        Curve(held_steps.astype(float), held_out),
        warmup,
        total,
        Curve(grid.astype(float), 2e-4 * rates),
        reproduction,
    )


def _overfit(rng, steps, held_steps, train, held_out, total):
    turn = total * rng.uniform(0.2, 0.6)

    def past(step):
        return np.maximum(step - turn, 0) / (total - turn)

    lower = rng.uniform(0.05, 0.4)  # the training loss ends at this share of its plateau
    progress = past(steps)
    if rng.random() < 0.5:  # training losses fall in stairs, a step at each epoch's start
        epochs = rng.integers(4, 12)
        progress = (np.floor(progress * epochs) + 0.3 * (progress * epochs % 1)) / epochs
    train = train * (1 - (1 - lower) * progress ** rng.uniform(0.6, 1))
    if rng.random() < 0.7:
        held_out = held_out * (1 + rng.uniform(0.05, 0.8) * past(held_steps) ** rng.uniform(0.7, 1.5))
    return train, held_out


def _diverge(rng, steps, held_steps, train, held_out, total, first):
    start = total * rng.uniform(0.3, 0.7)
    length = total * rng.uniform(0.02, 0.2)
    peak = first * rng.uniform(1.2, 4)

    def blend(step, curve):
        share = np.clip((step - start) / length, 0, 1)
        return (1 - share) * curve + share * peak

    return blend(steps, train), blend(held_steps, held_out)


def _wander(rng, points, scatter):
    """Normal noise of which up to half carries over from one measurement to the next, as weights wander."""
    carried, noise = rng.uniform(0, 0.5), rng.normal(0, 1, points)
    for index in range(1, points):
        noise[index] = carried * noise[index - 1] + np.sqrt(1 - carried**2) * noise[index]
    return scatter * noise


def _reproduction(rng, trained, held_out, probes=32):
    hits = [int(rng.binomial(probes, np.clip(share, 0, 1))) for share in (trained, held_out)]
    return Reproduction(hits[0], probes, hits[1], probes)
