"""By what a run's best checkpoint is chosen: the names of metrics, and which of two values is better."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Of the held-out rows: lower is better.
LOSSES = ("loss", "perplexity")
# Of answers to held-out prompts, by kind of task, as `evaluate` names them: higher is better. Instructions
# have none, as the constraints on their answers are not among the prepared rows.
TASK_METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "micro_f1", "valid"),
    "extraction": ("exact_match", "slot_f1", "slot_precision", "slot_recall", "token_f1", "valid_json"),
    "numeric": ("accuracy", "accuracy_last_number", "answered"),
    "generation": ("rougel", "rouge1", "rouge2", "bleu", "chrf"),
}
NAMES = tuple(dict.fromkeys([*LOSSES, *(name for names in TASK_METRICS.values() for name in names)]))
_WORST = 1e30  # JSON has no infinity


def rank(metric: str, value: float, loss: float) -> tuple[float, float]:
    """What measurements are sorted by, the best one last; of equal ones the lower held-out loss is better.

    Few answers make equal shares likely. A value that is not finite is the worst there is.

    Args:
        metric: One of `NAMES`.
        value: Of that metric.
        loss: Held out, measured at the same step.
    """
    return _higher(metric, value), _higher("loss", loss)


def _higher(metric: str, value: float) -> float:
    if not math.isfinite(value):
        return -_WORST
    return -value if metric in LOSSES else value
