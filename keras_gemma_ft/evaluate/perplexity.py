"""Perplexity alone: no answer is generated, only the held-out loss counts."""

from __future__ import annotations

from collections.abc import Sequence

from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.tasks import Outcome, TaskScores


class Perplexity:
    """Held-out loss and perplexity, which every evaluation reports, and nothing besides."""

    kind = "perplexity"
    generates = False

    def detect(self, examples: Sequence[Example]) -> bool:
        """Chosen by name only: any text has a perplexity."""
        return False

    def score(
        self, predictions: Sequence[str], references: Sequence[str], examples: Sequence[Example]
    ) -> TaskScores:
        return TaskScores([], [Outcome(0.0) for _ in references])
