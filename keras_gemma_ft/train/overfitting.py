"""Verdicts on a run from its train and held-out curves, with the evidence for each.

The curves are noisy, so nothing is decided on single points: levels are running medians or means, a change
must exceed several times its standard error *and* a size that matters, and every threshold says what it
stands for. They were set on labelled synthetic curves, and are tested on others.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from keras_gemma_ft.advice import Settings
from keras_gemma_ft.train.curves import (
    Curve,
    Slope,
    first_loss,
    held_out_levels,
    recent_falls,
    slope,
    train_levels,
    when_spent,
)
from keras_gemma_ft.train.remedies import remedies

Kind = Literal["warming up", "healthy", "plateau", "overfitting", "underfitting", "diverged", "memorizing"]
KINDS: tuple[Kind, ...] = (
    "warming up",
    "healthy",
    "plateau",
    "overfitting",
    "underfitting",
    "diverged",
    "memorizing",
)
# Going on makes the model worse.
HARMFUL: frozenset[Kind] = frozenset({"overfitting", "memorizing", "diverged"})


@dataclass(frozen=True)
class Thresholds:
    """What counts as a change that matters; shares are relative to the quantity named.

    Attributes:
        held_out_points: Fewer held-out measurements than this after the learning rate's warm-up, and the run
            is still warming up.
        train_points: The same for training losses.
        errors: A difference of levels must exceed this many of its standard errors. More than the usual 2
            to 3, because the best level is a minimum over many and therefore looks better than it is.
        rise: Of the best held-out level: how far above it is overfitting.
        nats: No difference smaller than this matters, whatever it is a share of.
        gap: Of the held-out level: a gap to the training loss this large is overfitting too, once held-out
            no longer falls.
        plateau: Of the whole fall: a curve that fell less than this over the last third of the run is flat.
            An exponential fall of two time constants brings 15% there, one of six 1.6%.
        late: Of the fall since the first quarter, and ...
        level: ... of the present level: a curve that surely fell more than both is not flat, however
            steep its beginning was. A base that does not know the format of the answers starts so high that
            beside its first steps all others look flat.
        learned: Of the first loss: a run that fell less than this has not learned.
        lost: Of what was learned: a training loss that gave back this much has diverged.
        reproduced: Training answers reproduced verbatim, beyond the share of held-out ones, that is
            memorizing.
        chance: The largest probability that the difference in reproduced answers is chance.
    """

    held_out_points: int = 4
    train_points: int = 10
    errors: float = 5.0
    rise: float = 0.02
    nats: float = 0.01
    gap: float = 0.5
    plateau: float = 0.04
    late: float = 0.2
    level: float = 0.1
    learned: float = 0.07
    lost: float = 0.5
    reproduced: float = 0.4
    chance: float = 0.01


@dataclass(frozen=True)
class Reproduction:
    """How many probed answers greedy generation gave verbatim.

    Attributes:
        trained: Of the training answers; `trained_of` were probed.
        held_out: Of the held-out answers; `held_out_of` were probed.
    """

    trained: int
    trained_of: int
    held_out: int
    held_out_of: int

    @property
    def excess(self) -> float:
        """The share of training answers beyond the share of held-out ones."""
        return self.trained / max(1, self.trained_of) - self.held_out / max(1, self.held_out_of)

    @property
    def chance(self) -> float:
        """Fisher's exact one-sided probability of such an excess if both kinds were reproduced alike."""
        from scipy.stats import fisher_exact

        table = [
            [self.trained, self.trained_of - self.trained],
            [self.held_out, self.held_out_of - self.held_out],
        ]
        return float(fisher_exact(table, alternative="greater").pvalue)


@dataclass(frozen=True)
class Evidence:
    """The numbers that a verdict rests on; None where there was too little to measure.

    Attributes:
        train_slope: Over the last third of the run.
        held_out_slope: Over the last third of the run.
        gap: Held-out minus training loss now, nats.
        best_step: The step of the best held-out level.
        best_loss: That level.
        held_out_loss: The held-out level now.
        steps_since_best: Steps from `best_step` to now.
        rise: Held-out level now above the best one, nats.
        rise_error: Its standard error.
        fall: By how much the loss has fallen, as a share of where it began.
        recent_fall: What the last third of the run brought, as a share of the whole fall.
        late_fall: The same as a share of the fall since the first quarter.
        level_fall: The same as a share of the present level.
        reproduction: Where answers were probed.
    """

    train_slope: Slope | None = None
    held_out_slope: Slope | None = None
    gap: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    held_out_loss: float | None = None
    steps_since_best: int | None = None
    rise: float | None = None
    rise_error: float | None = None
    fall: float = 0.0
    recent_fall: float = 0.0
    late_fall: float = 0.0
    level_fall: float = 0.0
    reproduction: Reproduction | None = None


@dataclass(frozen=True)
class Verdict:
    """A judgement of the run so far.

    Attributes:
        kind: One of `KINDS`.
        step: When it was given.
        reason: One sentence with the numbers that decided.
        evidence: All the numbers.
        remedies: What to change, the first thing first; empty where nothing is wrong.
    """

    kind: Kind
    step: int
    reason: str
    evidence: Evidence = field(default_factory=Evidence)
    remedies: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record for `metrics.jsonl`: `{"step", "verdict", "reason", "evidence", "remedies"}`."""
        evidence = {
            key: value for key, value in dataclasses.asdict(self.evidence).items() if value is not None
        }
        return {
            "step": self.step,
            "verdict": self.kind,
            "reason": self.reason,
            "evidence": evidence,
            "remedies": list(self.remedies),
        }


def judge(
    train: Curve,
    held_out: Curve,
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    learning_rates: Curve | None = None,
    reproduction: Reproduction | None = None,
    settings: Settings | None = None,
    thresholds: Thresholds = Thresholds(),
) -> Verdict:
    """The verdict on a run so far.

    Args:
        train: The training loss, one point a step or fewer.
        held_out: The loss on the same held-out rows each time; may be empty, and then overfitting cannot be
            seen.
        warmup_steps: Of the learning rate; before their end nothing is judged but divergence.
        total_steps: Planned length; a run that has not learned is called underfitting from its half on.
        learning_rates: Over steps, where they change: a schedule that decays flattens every curve at its
            end, so what is recent is then measured in learning rate spent instead of steps.
        reproduction: Of the latest probe.
        settings: The user's numbers, for the remedies.
        thresholds: What counts as a change that matters.
    """
    step = int(max([*train.steps[-1:], *held_out.steps[-1:]], default=0))

    def verdict(kind: Kind, reason: str, evidence: Evidence) -> Verdict:
        advice = remedies(kind, settings or Settings(), best_step=evidence.best_step, step=step)
        return Verdict(kind, step, reason, evidence, tuple(advice))

    for name, curve in (("training", train), ("held-out", held_out)):
        bad = ~np.isfinite(curve.losses)
        if bad.any():
            first = int(curve.steps[bad][0])
            return verdict("diverged", f"the {name} loss is not finite since step {first}", Evidence())

    if lost := _diverged(train, warmup_steps, thresholds):
        return verdict("diverged", lost, Evidence())
    if awaited := _awaited(train, held_out, step, warmup_steps, thresholds):
        return verdict("warming up", awaited, Evidence())
    early, since = (when_spent(share, train, learning_rates) for share in (1 / 4, 2 / 3))
    evidence = _measure(train, held_out, early, since, reproduction)
    kind, reason = _decide(evidence, step, total_steps, thresholds)
    return verdict(kind, reason, evidence)


def _diverged(train: Curve, warmup_steps: int, limits: Thresholds) -> str | None:
    """Why training is lost, or None: it gave back much of what was learned, or rose above where it began."""
    if len(train) < limits.train_points or train.steps[-1] <= warmup_steps:
        return None
    levels = train_levels(train)
    first, _ = first_loss(train)
    needed = max(limits.lost * (first - levels.best), 0.1 * first, limits.errors * levels.error, limits.nats)
    if levels.rise <= needed:
        return None
    return f"the training loss rose from {levels.best:.3f} back to {levels.now:.3f}; it began at {first:.3f}"


def _awaited(train: Curve, held_out: Curve, step: int, warmup_steps: int, limits: Thresholds) -> str | None:
    """What has to happen before the run can be judged, or None."""
    if step <= warmup_steps:
        return f"the learning rate is warming up until step {warmup_steps}"
    if len(train) < limits.train_points:
        return f"{len(train)} of the {limits.train_points} training losses that a verdict needs"
    judged = int((held_out.steps > warmup_steps).sum())
    if len(held_out) and judged < limits.held_out_points:
        return f"{judged} of the {limits.held_out_points} held-out losses that a verdict needs"
    return None


def _decide(evidence: Evidence, step: int, total_steps: int | None, limits: Thresholds) -> tuple[Kind, str]:
    """The verdict on finite curves of sufficient length, the gravest first."""
    falling, trend = _falling(evidence, limits), _judged_slope(evidence)
    if memorized := _memorizing(evidence, falling, limits):
        return "memorizing", memorized
    if overfitted := _overfitting(evidence, falling, limits):
        return "overfitting", overfitted
    if evidence.fall < limits.learned:
        learned = f"the loss fell by {100 * max(evidence.fall, 0):.1f}% of where it began"
        if total_steps and step < total_steps / 2:
            return "warming up", f"{learned}; that is judged from step {math.ceil(total_steps / 2)} on"
        return "underfitting", f"{learned}, in {step} steps"
    which = "training" if evidence.best_loss is None else "held-out"
    if falling:
        return "healthy", f"the {which} loss is still falling: {trend}"
    recent = f"the last third of the run brought {100 * evidence.recent_fall:.1f}% of its whole fall"
    return "plateau", f"the {which} loss no longer falls: {trend}; {recent}"


def _memorizing(evidence: Evidence, falling: bool, limits: Thresholds) -> str | None:
    """Why it is memorizing, or None: a model whose held-out loss still falls is only learning."""
    probed = evidence.reproduction
    if probed is None or falling or probed.excess < limits.reproduced or probed.chance > limits.chance:
        return None
    return (
        f"{probed.trained} of {probed.trained_of} training answers are reproduced verbatim, "
        f"and {probed.held_out} of {probed.held_out_of} held-out ones"
    )


def _overfitting(evidence: Evidence, falling: bool, limits: Thresholds) -> str | None:
    """Why it is overfitting, or None: held-out has risen, or has stopped far above the training loss."""
    best, now, gap = evidence.best_loss, evidence.held_out_loss, evidence.gap
    rise, error = evidence.rise, evidence.rise_error
    if best is None or now is None or gap is None or rise is None or error is None:
        return None
    if rise > max(limits.rise * best, limits.nats, limits.errors * error):
        return (
            f"the held-out loss rose from {best:.3f} at step {evidence.best_step} to {now:.3f}, "
            f"{gap:.3f} above the training loss"
        )
    if not falling and gap > max(limits.gap * now, 10 * limits.nats):
        return f"the held-out loss stopped falling at {now:.3f}, {gap:.3f} above the training loss"
    return None


def _falling(evidence: Evidence, limits: Thresholds) -> bool:
    """Whether the loss fell lately by an amount that matters and that noise does not explain.

    Few held-out points leave their slope uncertain; a training loss that surely falls then speaks for it.
    """
    trend, training = _judged_slope(evidence), evidence.train_slope
    if trend is None or training is None:
        return False
    if evidence.late_fall > limits.late and evidence.level_fall > limits.level:
        return trend.value < -2.5 * trend.error
    if evidence.recent_fall <= limits.plateau:
        return False
    return trend.value < -2 * trend.error or (
        trend.value < -trend.error and training.value < -3 * training.error
    )


def _judged_slope(evidence: Evidence) -> Slope | None:
    """Held-out where there is such a curve, else training."""
    return evidence.train_slope if evidence.best_loss is None else evidence.held_out_slope


def _measure(
    train: Curve, held_out: Curve, early: float, since: float, reproduction: Reproduction | None
) -> Evidence:
    ours = train_levels(train)
    first, first_error = first_loss(train)
    # No more than what has surely been learned: a first loss from few noisy steps is easily too high.
    fall = first - ours.now - math.hypot(first_error, ours.error)
    common: dict[str, Any] = {"train_slope": slope(train, since), "reproduction": reproduction}
    if not len(held_out):
        falls = recent_falls(train, early, since, whole=first - ours.now, now=ours.now)
        return Evidence(fall=fall / first, **falls, **common)
    theirs, held_first = held_out_levels(held_out), float(held_out.losses[0])
    whole = max(held_first - theirs.best, first - ours.now)
    best_step = int(held_out.steps[theirs.best_index])
    return Evidence(
        held_out_slope=slope(held_out, since),
        gap=theirs.now - ours.now,
        best_step=best_step,
        best_loss=theirs.best,
        held_out_loss=theirs.now,
        steps_since_best=int(held_out.steps[-1]) - best_step,
        rise=theirs.rise,
        rise_error=theirs.error,
        fall=max(fall / first, (held_first - theirs.best) / held_first),
        **recent_falls(held_out, early, since, whole=whole, now=theirs.now),
        **common,
    )
