"""Numeric answers: the answer ends in a number that is right or wrong."""

from __future__ import annotations

from collections.abc import Sequence

from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.metrics import last_number, marked_number, to_number
from keras_gemma_ft.evaluate.statistics import mean_metric
from keras_gemma_ft.evaluate.tasks import Outcome, TaskScores


class Numeric:
    """Whether the final number is exactly the expected one.

    As in GSM8K (Cobbe et al. 2021) the final number follows `####`; thousands separators and a dollar sign
    are ignored and 42 equals 42.0. Where the references have no marker, it is the last number. A second
    figure accepts the last number of an answer without marker too: it tells a model that calculates wrongly
    from one that forgets the form.
    """

    kind = "numeric"
    generates = True

    def detect(self, examples: Sequence[Example]) -> bool:
        """Nine in ten references hold `#### number`, or all of them are numbers of many different values."""
        references = [example.reference for example in examples]
        marked = sum(marked_number(text) is not None for text in references)
        if references and marked >= 0.9 * len(references):
            return True
        bare = bool(references) and all(to_number(text) is not None for text in references)
        return bare and len(set(references)) > max(2, len(references) // 2)

    def score(
        self, predictions: Sequence[str], references: Sequence[str], examples: Sequence[Example]
    ) -> TaskScores:
        strict, lenient, outcomes = [], [], []
        for answer, reference in zip(predictions, references, strict=True):
            expected = marked_number(reference)
            form_needed = expected is not None
            if expected is None:
                expected = last_number(reference)
            found = marked_number(answer) if form_needed else last_number(answer)
            anywhere = found if found is not None else last_number(answer)
            hit = found is not None and found == expected
            strict.append(hit)
            lenient.append(anywhere is not None and anywhere == expected)
            outcomes.append(Outcome(float(hit), hit, "" if found is not None else "no final number"))
        answered = [not outcome.note for outcome in outcomes]
        return TaskScores(
            [
                mean_metric("accuracy", "accuracy", strict, binary=True),
                mean_metric("accuracy_last_number", "accuracy, last number", lenient, binary=True),
                mean_metric("answered", "final number given", answered, binary=True),
            ],
            outcomes,
        )
