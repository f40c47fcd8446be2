"""The kinds of task, how one is recognized in the data, and what scoring one returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.statistics import Metric


@dataclass(frozen=True)
class Outcome:
    """How one answer fared.

    Attributes:
        score: From 0 (useless) to 1 (as good as the reference).
        correct: Whether it is right; None where the task has no such notion.
        note: What is remarkable about it ("invalid label", "no JSON object"); empty otherwise.
    """

    score: float
    correct: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model on one task.

    Attributes:
        metrics: The most important one first; all over the same rows.
        outcomes: One per row.
        details: What only this kind of task has, ready for JSON: a confusion matrix, scores per class or
            slot, metric signatures.
    """

    metrics: list[Metric]
    outcomes: list[Outcome]
    details: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """One kind of task.

    Attributes:
        kind: Its name in `config.task.kind` and in `evaluation.json`.
        generates: Whether it needs generated answers; False for perplexity alone.
    """

    kind: str
    generates: bool

    def detect(self, examples: Sequence[Example]) -> bool:
        """Whether these rows look like this kind of task."""

    def score(
        self, predictions: Sequence[str], references: Sequence[str], examples: Sequence[Example]
    ) -> TaskScores:
        """Scores one answer per row."""


def kinds() -> dict[str, type[Task]]:
    """Every kind by name, in the order in which they are tried on the data: the most particular first."""
    from keras_gemma_ft.evaluate.classification import Classification
    from keras_gemma_ft.evaluate.extraction import Extraction
    from keras_gemma_ft.evaluate.generation import Generation
    from keras_gemma_ft.evaluate.instructions import Instructions
    from keras_gemma_ft.evaluate.numeric import Numeric
    from keras_gemma_ft.evaluate.perplexity import Perplexity

    ordered: list[type[Any]] = [Instructions, Numeric, Classification, Extraction, Generation, Perplexity]
    return {kind.kind: kind for kind in ordered}


def build_task(kind: str, examples: Sequence[Example], **settings: Any) -> Task:
    """The task named `kind`, or for "auto" the first kind that recognizes the rows.

    Args:
        kind: "auto", or a name that `kinds()` lists.
        examples: Held-out rows; with "auto" they decide.
        settings: `labels` and `abstentions` for classification, `constraints` for instructions. With "auto"
            each kind takes those that are its own.

    Raises:
        UserError: No such kind, or no such setting.
    """
    known = kinds()
    if kind == "auto":
        tasks = (
            task(**{name: value for name, value in settings.items() if name in _fields(task)})
            for task in known.values()
        )
        return next(task for task in tasks if task.detect(examples))
    if kind not in known:
        raise UserError(
            f"there is no task kind {kind!r}",
            where="task.kind",
            remedy=f"choose one of: auto, {', '.join(known)}.",
        )
    unknown = sorted(settings.keys() - _fields(known[kind]))
    if unknown:
        raise UserError(
            f"a task of kind {kind!r} has no setting {unknown[0]!r}",
            where="task",
            remedy=f"it has: {', '.join(sorted(_fields(known[kind]))) or 'none'}.",
        )
    return known[kind](**settings)


def _fields(task: type[Task]) -> frozenset[str]:
    """Settings are the dataclass fields of a kind that has any."""
    declared: Mapping[str, Any] = getattr(task, "__dataclass_fields__", {})
    return frozenset(declared)
