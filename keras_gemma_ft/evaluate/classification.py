"""Classification: the answer names one label of a known set."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.statistics import Metric, divide, mean_metric
from keras_gemma_ft.evaluate.tasks import Outcome, TaskScores

INVALID, ABSTAINED = "(invalid)", "(abstained)"
# An answer that declines to name a label, in the words that models use for it.
_ABSTENTIONS = (
    "",
    "unknown",
    "none",
    "n/a",
    "not sure",
    "unsure",
    "i don't know",
    "i do not know",
    "cannot say",
)
_EDGES = string.punctuation + string.whitespace
_LONGEST_LABEL = 64


@dataclass
class Classification:
    """Accuracy, macro and micro F1, scores per class, the confusion matrix.

    An answer counts as a label where it *is* the label, but for case, surrounding punctuation and white
    space, or where it mentions exactly one label as a whole word ("The intent is: card_arrival.").
    Everything else is invalid, or abstained where it declines; both are wrong, and both are counted apart.

    Attributes:
        labels: The known labels; where empty, those of the references.
        abstentions: Answers that decline, compared as labels are.
    """

    kind = "classification"
    generates = True
    labels: Sequence[str] = ()
    abstentions: Sequence[str] = field(default=_ABSTENTIONS)

    def detect(self, examples: Sequence[Example]) -> bool:
        """All answers are known labels; or short single lines that occur at least twice on average."""
        references = {example.reference for example in examples}
        if self.labels:
            return bool(references) and references <= set(self.labels)
        if any(len(text) > _LONGEST_LABEL or "\n" in text or text[:1] in ("", "{") for text in references):
            return False
        return 2 <= len(references) <= max(2, len(examples) // 2)

    def read(self, answer: str, labels: Sequence[str]) -> str:
        """The label that an answer names, or `INVALID` or `ABSTAINED`."""
        if answer.strip() in labels:
            return answer.strip()
        by_folded = {_fold(label): label for label in labels}
        folded = _fold(answer)
        if folded in by_folded:
            return by_folded[folded]
        if folded in {_fold(text) for text in self.abstentions}:
            return ABSTAINED
        mentioned = set()
        rest = " ".join(answer.casefold().split())
        # Longest first, and each found label is cut out: "top up limits" does not mention "top up".
        for name in sorted(by_folded, key=len, reverse=True):
            rest, found = re.subn(rf"(?<!\w){re.escape(name)}(?!\w)", "\0", rest) if name else (rest, 0)
            if found:
                mentioned.add(by_folded[name])
        return mentioned.pop() if len(mentioned) == 1 else INVALID

    def score(
        self, predictions: Sequence[str], references: Sequence[str], examples: Sequence[Example]
    ) -> TaskScores:
        labels = sorted({*self.labels, *references})
        read = [self.read(answer, labels) for answer in predictions]
        outcomes = [
            Outcome(float(ours == expected), ours == expected, _note(ours))
            for ours, expected in zip(read, references, strict=True)
        ]
        correct = [outcome.score for outcome in outcomes]
        counts = _class_counts(read, references, labels)
        metrics = [
            mean_metric("accuracy", "accuracy", correct, binary=True),
            Metric("macro_f1", "macro F1", counts, _macro_f1),
            Metric("micro_f1", "micro F1", counts, _micro_f1),
            mean_metric(
                "valid", "valid labels", [float(not outcome.note) for outcome in outcomes], binary=True
            ),
        ]
        return TaskScores(metrics, outcomes, _details(read, list(references), labels))


def _fold(text: str) -> str:
    return " ".join(text.casefold().strip(_EDGES).split())


def _note(label: str) -> str:
    return {INVALID: "invalid label", ABSTAINED: "abstained"}.get(label, "")


def _class_counts(read: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """float64 `[rows, 3 × labels]`: true positives, predicted, expected, one column each per label."""
    index = {label: position for position, label in enumerate(labels)}
    counts = np.zeros((len(references), 3, len(labels)))
    for row, (ours, expected) in enumerate(zip(read, references, strict=True)):
        counts[row, 2, index[expected]] = 1
        if ours in index:
            counts[row, 1, index[ours]] = 1
            counts[row, 0, index[ours]] = float(ours == expected)
    return counts.reshape(len(references), -1)


def _split(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    by_class = sums.reshape(*sums.shape[:-1], 3, -1)
    return by_class[..., 0, :], by_class[..., 1, :], by_class[..., 2, :]


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean over the classes of the references: the same ones for base and tuned."""
    hit, predicted, expected = _split(sums)
    present = expected > 0
    return divide((divide(2 * hit, predicted + expected) * present).sum(-1), present.sum(-1))


def _micro_f1(sums: np.ndarray) -> np.ndarray:
    hit, predicted, expected = _split(sums)
    return divide(2 * hit.sum(-1), predicted.sum(-1) + expected.sum(-1))


def _details(read: list[str], references: list[str], labels: list[str]) -> dict[str, object]:
    """Scores per class by scikit-learn; the confusion matrix has columns for answers that are no label."""
    from sklearn.metrics import precision_recall_fscore_support

    used = [label for label in labels if label in {*references, *read}]
    precision, recall, f1, support = precision_recall_fscore_support(
        references, read, labels=used, zero_division=0.0
    )
    columns = [*used, *(extra for extra in (ABSTAINED, INVALID) if extra in read)]
    pairs = Counter(zip(references, read, strict=True))
    confused = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    return {
        "labels": used,
        "per_class": [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for label, p, r, f, n in zip(used, precision, recall, f1, support, strict=True)
        ],
        "confusion": {
            "columns": columns,
            "counts": [[pairs[expected, ours] for ours in columns] for expected in used],
        },
        "most_confused": [
            {"expected": expected, "predicted": ours, "count": count}
            for (expected, ours), count in confused.most_common(10)
        ],
        "abstained": read.count(ABSTAINED),
        "invalid": read.count(INVALID),
    }
