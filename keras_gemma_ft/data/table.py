"""All examined rows of a dataset, and what follows from having them together: near duplicates and classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from keras_gemma_ft.data.dedupe import NearPairs, Sketches, near_pairs
from keras_gemma_ft.data.examine import Examined
from keras_gemma_ft.data.rows import Problem

TRAIN, HELD_OUT = "train", "held-out"

# Answers count as classes if there are at most so many, each given so often on average, and this short.
_MOST_CLASSES = 200
_ROWS_PER_CLASS = 5
_LONGEST_CLASS = 80


class Table:
    """All examined rows, the training part first.

    Attributes:
        part: int64 [rows]; index into `parts`.
        problems: Of the rows that cannot be trained on, in order.
        similarity: From which on questions count as alike.
        max_length: Tokens of a row.
    """

    def __init__(self, parts: Sequence[str], similarity: float, max_length: int) -> None:
        self.parts = parts
        self.similarity = similarity
        self.max_length = max_length
        self.problems: list[Problem] = []
        self.origins: list[str] = []
        self.labels: list[str | None] = []
        self.questions: list[str] = []
        self.answers: list[str] = []
        self.languages: list[str | None] = []
        self.personal: list[dict[str, list[str]]] = []
        self._arrays: dict[str, list[np.ndarray]] = defaultdict(list)
        self._asked: list[Sketches] = []

    def add(self, part: int, examined: Examined) -> None:
        """Adds a chunk of a part; parts come one after the other."""
        self.problems += examined.problems
        for name in ("origins", "labels", "questions", "answers", "languages", "personal"):
            getattr(self, name).extend(getattr(examined, name))
        for name in ("question_keys", "answer_keys", "tokens", "spelled", "empty"):
            self._arrays[name].append(getattr(examined, name))
        self._arrays["part"].append(np.full(len(examined.origins), part))
        self._asked.append(examined.asked)

    def __len__(self) -> int:
        return len(self.origins)

    def array(self, name: str) -> np.ndarray:
        """A column of `Examined` over all rows, or `part`."""
        return np.concatenate(self._arrays[name]) if self._arrays[name] else np.zeros(0, np.int64)

    @cached_property
    def part(self) -> np.ndarray:
        return self.array("part")

    @cached_property
    def question_keys(self) -> list[int]:
        return self.array("question_keys").tolist()

    @cached_property
    def answer_keys(self) -> list[int]:
        return self.array("answer_keys").tolist()

    @cached_property
    def tokens(self) -> np.ndarray:
        return self.array("tokens")

    @cached_property
    def near(self) -> NearPairs:
        """Pairs of rows whose questions are alike."""
        return near_pairs(Sketches.joined(self._asked), self.similarity)

    @cached_property
    def classes(self) -> list[str] | None:
        """The class of each row; see `classes_of`."""
        return classes_of(self.labels, self.answers)

    def partners(self) -> tuple[dict[int, tuple[int, float]], dict[int, tuple[int, float]]]:
        """For each row the most similar one with its similarity: of all rows, and of the training part."""
        closest: dict[int, tuple[int, float]] = {}
        closest_trained: dict[int, tuple[int, float]] = {}
        part = self.part.tolist()
        near = self.near
        for a, b, similarity in zip(
            near.first.tolist(), near.second.tolist(), near.similarity.tolist(), strict=True
        ):
            for row, other in ((a, b), (b, a)):
                if similarity > closest.get(row, (0, 0.0))[1]:
                    closest[row] = other, similarity
                if part[other] == 0 and similarity > closest_trained.get(row, (0, 0.0))[1]:
                    closest_trained[row] = other, similarity
        return closest, closest_trained

    def at(self, rows: Iterable[int], say: Callable[[int], str]) -> list[tuple[str, str]]:
        """Places of rows, with what is to be said of each."""
        return [(self.origins[row], say(row)) for row in rows]


def classes_of(labels: Sequence[str | None], answers: Sequence[str]) -> list[str] | None:
    """The class of each row: its label, or its answer if answers are few and short. None: no classes."""
    if any(label is not None for label in labels):
        return ["(none)" if label is None else label for label in labels]
    kinds = set(answers)
    if 2 <= len(kinds) <= min(_MOST_CLASSES, len(answers) / _ROWS_PER_CLASS) and all(
        len(answer) <= _LONGEST_CLASS for answer in kinds
    ):
        return list(answers)
    return None


def class_counts(table: Table) -> tuple[Counter[str], Counter[str]]:
    """Rows of each class, in the training and in the held-out part."""
    counts: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    for name, part in zip(table.classes or (), table.part.tolist(), strict=False):
        counts[part][name] += 1
    return counts
