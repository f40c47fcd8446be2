"""Extraction: the answer is a span of text, or a JSON object of slots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.metrics import bag_f1, exact_match, normalize, parse_object, slots, token_f1
from keras_gemma_ft.evaluate.statistics import Metric, divide, mean_metric
from keras_gemma_ft.evaluate.tasks import Outcome, TaskScores

_LONGEST_SPAN = 12  # words


class Extraction:
    """Exact match, token F1 and slot F1.

    Where the references are JSON objects, an answer is right when it has the same slots with the same values
    (order, case and spacing aside); token F1 is over `(slot, token)` pairs, and slot precision, recall and
    F1 over `(slot, value)` pairs of all rows together. Otherwise exact match and token F1 are SQuAD's.
    """

    kind = "extraction"
    generates = True

    def detect(self, examples: Sequence[Example]) -> bool:
        """Nine in ten references are JSON objects, or short spans of which most occur in what was asked."""
        references = [example.reference for example in examples]
        if not references:
            return False
        if _share(_is_object(text) for text in references) >= 0.9:
            return True
        spans = [
            len(example.reference.split()) <= _LONGEST_SPAN
            and normalize(example.reference) in normalize(example.question)
            for example in examples
        ]
        return _share(spans) >= 0.6

    def score(
        self, predictions: Sequence[str], references: Sequence[str], examples: Sequence[Example]
    ) -> TaskScores:
        if all(_is_object(text) for text in references):
            return _score_objects(predictions, references)
        pairs = list(zip(predictions, references, strict=True))
        exact = [exact_match(*pair) for pair in pairs]
        f1 = [token_f1(*pair) for pair in pairs]
        return TaskScores(
            [
                mean_metric("exact_match", "exact match", exact, binary=True),
                mean_metric("token_f1", "token F1", f1),
            ],
            [Outcome(score, hit) for score, hit in zip(f1, exact, strict=True)],
        )


def _score_objects(predictions: Sequence[str], references: Sequence[str]) -> TaskScores:
    outcomes, exact, tokens, counts = [], [], [], []
    by_slot: dict[str, np.ndarray] = {}
    for answer, reference in zip(predictions, references, strict=True):
        parsed = parse_object(answer)
        ours, theirs = Counter(slots(parsed or {})), Counter(slots(json.loads(reference)))
        hits = ours & theirs
        exact.append(parsed is not None and ours == theirs)
        tokens.append(bag_f1(_slot_tokens(ours), _slot_tokens(theirs)) if parsed is not None else 0.0)
        counts.append([hits.total(), ours.total(), theirs.total()])
        outcomes.append(Outcome(tokens[-1], exact[-1], "" if parsed is not None else "no JSON object"))
        for column, bag in enumerate((hits, ours, theirs)):
            for (slot, _), count in bag.items():
                by_slot.setdefault(slot, np.zeros(3))[column] += count
    rows = np.asarray(counts, np.float64).reshape(-1, 3)
    metrics = [
        mean_metric("exact_match", "exact match", exact, binary=True),
        Metric("slot_f1", "slot F1", rows, _f1),
        Metric("slot_precision", "slot precision", rows, lambda sums: divide(sums[..., 0], sums[..., 1])),
        Metric("slot_recall", "slot recall", rows, lambda sums: divide(sums[..., 0], sums[..., 2])),
        mean_metric("token_f1", "token F1", tokens),
        mean_metric(
            "valid_json", "valid JSON", [float(not outcome.note) for outcome in outcomes], binary=True
        ),
    ]
    per_slot = [
        {
            "slot": slot,
            "precision": float(divide(sums[0], sums[1])),
            "recall": float(divide(sums[0], sums[2])),
            "f1": float(_f1(sums)),
            "support": int(sums[2]),
        }
        for slot, sums in sorted(by_slot.items())
    ]
    return TaskScores(metrics, outcomes, {"per_slot": per_slot})


def _slot_tokens(bag: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(slot, token) for slot, value in bag.elements() for token in normalize(value).split()]


def _f1(sums: np.ndarray) -> np.ndarray:
    return divide(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _is_object(text: str) -> bool:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict)


def _share(hits: Any) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)
