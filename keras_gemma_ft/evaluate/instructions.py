"""Instruction following: whether an answer has the form that was asked for.

A row's constraints are an object with any of these fields; all that are given must hold:

    {"json_schema": {...}, "regex": "\\d+ km", "full_match": "yes|no",
     "keywords": ["refund"], "forbidden": ["sorry"],
     "min_words": 5, "max_words": 50, "max_characters": 280, "max_sentences": 2, "max_lines": 3,
     "starts_with": "Dear", "ends_with": "."}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.generation import import_metric_library
from keras_gemma_ft.evaluate.statistics import ratio_metric
from keras_gemma_ft.evaluate.tasks import Outcome, TaskScores

_FENCE = re.compile(r"\A```\w*\n(.*)\n```\Z", re.DOTALL)


@dataclass
class Instructions:
    """The share of answers that satisfy all of their constraints, and the share of constraints satisfied.

    Attributes:
        constraints: For every row that has none of its own.
    """

    kind = "instructions"
    generates = True
    constraints: Mapping[str, Any] = field(default_factory=dict)

    def detect(self, examples: Sequence[Example]) -> bool:
        """Nine in ten rows say what an answer must satisfy."""
        return bool(examples) and sum(bool(row.constraints) for row in examples) >= 0.9 * len(examples)

    def score(
        self, predictions: Sequence[str], references: Sequence[str], examples: Sequence[Example]
    ) -> TaskScores:
        outcomes, followed, kept, given = [], [], [], []
        by_kind: dict[str, list[bool]] = {}
        for answer, example in zip(predictions, examples, strict=True):
            results = check(answer, example.constraints or self.constraints, where=example.origin)
            broken = [name for name, held in results.items() if not held]
            for name, held in results.items():
                by_kind.setdefault(name, []).append(held)
            followed.append(float(bool(results) and not broken))
            kept.append(len(results) - len(broken))
            given.append(len(results))
            if results:
                note = f"broken: {', '.join(broken)}" if broken else ""
                outcomes.append(Outcome(kept[-1] / given[-1], not broken, note))
            else:
                outcomes.append(Outcome(1.0))
        # A row that asks for nothing counts neither for nor against.
        asked = [float(count > 0) for count in given]
        return TaskScores(
            [
                replace(ratio_metric("followed", "all constraints kept", followed, asked), binary=True),
                ratio_metric("constraints", "constraints kept", kept, given),
            ],
            outcomes,
            {
                "per_constraint": [
                    {"constraint": name, "kept": sum(held), "of": len(held)}
                    for name, held in sorted(by_kind.items())
                ]
            },
        )


def check(answer: str, constraints: Mapping[str, Any], where: str = "") -> dict[str, bool]:
    """Which of the constraints an answer satisfies.

    Raises:
        UserError: A constraint is unknown or malformed.
    """
    results = {}
    for name, wanted in constraints.items():
        if name not in _CHECKS:
            raise UserError(
                f"there is no constraint {name!r}",
                where=where or "constraints",
                remedy=f"choose from: {', '.join(_CHECKS)}.",
            )
        try:
            results[name] = bool(_CHECKS[name](answer.strip(), wanted))
        except (re.error, TypeError) as error:
            raise UserError(
                f"the constraint {name!r} cannot be checked: {error}",
                where=where or "constraints",
                remedy=f"correct its value, which is {wanted!r}.",
            ) from error
    return results


def _matches_schema(answer: str, schema: Any) -> bool:
    """Whether the whole answer, or the inside of its code fence, is JSON that satisfies the schema."""
    jsonschema = import_metric_library("jsonschema")
    fenced = _FENCE.match(answer)
    try:
        value = json.loads(fenced.group(1) if fenced else answer)
        jsonschema.validate(value, schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    except jsonschema.SchemaError as error:
        raise TypeError(error.message) from error
    return True


def _contains(answer: str, words: Sequence[str]) -> list[bool]:
    return [
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None for word in words
    ]


def _sentences(answer: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s+|$)", answer) if part.strip()])


_CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "json_schema": _matches_schema,
    "regex": lambda answer, pattern: re.search(pattern, answer) is not None,
    "full_match": lambda answer, pattern: re.fullmatch(pattern, answer, re.IGNORECASE) is not None,
    "keywords": lambda answer, words: all(_contains(answer, words)),
    "forbidden": lambda answer, words: not any(_contains(answer, words)),
    "min_words": lambda answer, limit: len(answer.split()) >= limit,
    "max_words": lambda answer, limit: 0 < len(answer.split()) <= limit,
    "max_characters": lambda answer, limit: 0 < len(answer) <= limit,
    "max_sentences": lambda answer, limit: 0 < _sentences(answer) <= limit,
    "max_lines": lambda answer, limit: 0 < len(answer.splitlines()) <= limit,
    "starts_with": lambda answer, text: answer.startswith(text),
    "ends_with": lambda answer, text: answer.endswith(text),
}
