"""Holding a part of the rows out: stratified, never one question on both sides, the same for a seed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from keras_gemma_ft.data.layout import MODEL_ROLES
from keras_gemma_ft.data.rows import Conversation, Problem, Row
from keras_gemma_ft.errors import UserError

# Rows of so much text (some 200 MB of memory) are kept when they are read to be divided; larger input is read
# again for each part.
_KEPT_CHARACTERS = 64 << 20
_ALONE = -1  # the stratum of all rows whose answer no other question shares


def hold_out(rows: Iterable[Row], fraction: float, seed: int) -> tuple[Part, Part]:
    """Divides rows into those to train on and those held out.

    Rows that ask the same (what comes before the first answer, but for case and spacing) stay together. The
    held-out part has each label, or each answer that is given to several questions, as often in proportion
    as the whole. Rows that are too large to be kept in memory are read once to divide them, and once more for
    each part.

    Args:
        rows: Can be iterated again and again, always in the same order.
        fraction: Share to hold out.
        seed: Decides which.

    Returns:
        Training and held-out rows, in the order of `rows`. A problem among the rows is passed on in the
        training part, to be counted there. Nothing is read before the first part is iterated.

    Raises:
        UserError: When the first part is iterated: all rows ask the same, or are problems.
    """
    division = _Division(rows, fraction, seed)
    return Part(division, held_out=False), Part(division, held_out=True)


class Part:
    """One side of a division; can be iterated again and again."""

    def __init__(self, division: _Division, held_out: bool) -> None:
        self._division = division
        self._held_out = held_out

    def __len__(self) -> int:
        chosen = self._division.held_out
        return int(np.count_nonzero(chosen == self._held_out))

    def __iter__(self) -> Iterator[Row]:
        chosen = (self._division.held_out == self._held_out).tolist()
        return (row for row, is_chosen in zip(self._division, chosen, strict=True) if is_chosen)


class _Division:
    def __init__(self, rows: Iterable[Row], fraction: float, seed: int) -> None:
        self._rows = rows
        self._kept: list[Row] | None = []
        self._fraction = fraction
        self._seed = seed

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows if self._kept is None else self._kept)

    @cached_property
    def held_out(self) -> np.ndarray:
        """bool [rows]; False for problems."""
        questions, answers, places = array("Q"), array("Q"), array("Q")
        count = characters = 0
        problem: Problem | None = None
        for count, row in enumerate(self._rows, 1):
            if self._kept is not None:
                self._kept.append(row)
                characters += _characters(row)
                if characters > _KEPT_CHARACTERS:
                    self._kept = None
            if isinstance(row, Conversation):
                question, answer = _keys(row)
                questions.append(question)
                answers.append(answer)
                places.append(count - 1)
            else:
                problem = problem or row
        if problem is not None and not places:
            error = problem.error()
            raise UserError(f"no row can be trained on; the first: {error.what}", error.where, error.remedy)
        chosen = np.zeros(count, bool)
        at = np.frombuffer(places, np.uint64).astype(np.int64)
        group_of = _numbered(np.frombuffer(questions, np.uint64))
        stratum_of = _numbered(np.frombuffer(answers, np.uint64))
        chosen[at] = choose(group_of, stratum_of, self._fraction, self._seed)
        return chosen


def choose(group_of: np.ndarray, stratum_of: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out.

    Args:
        group_of: int64 [rows]; rows of a group stay together. Groups are numbered from 0 as they come.
        stratum_of: int64 [rows]; of which held-out rows get their share each. A group belongs to the stratum
            of its first row.
        fraction, seed: See `hold_out`.

    Returns:
        bool [rows].

    Raises:
        UserError: There are fewer than two groups.
    """
    groups = int(group_of.max(initial=-1)) + 1
    if groups < 2:
        raise UserError(
            f"nothing can be held out: {len(group_of):,} rows ask {groups} question{'s' * (groups != 1)}",
            where="data.eval_fraction",
            remedy="give more rows, or held-out rows of their own in data.eval.",
        )
    sizes = np.bincount(group_of)
    first_rows = np.unique(group_of, return_index=True)[1]
    strata = _numbered(stratum_of[first_rows])
    strata[np.bincount(strata)[strata] == 1] = _ALONE
    key = np.array([seed % 2**64, 0], np.uint64)
    shuffled = np.argsort(np.random.Philox(key=key).random_raw(groups), kind="stable")
    held = np.zeros(groups, bool)
    members: dict[int, list[int]] = {}
    for group in shuffled.tolist():
        members.setdefault(int(strata[group]), []).append(group)
    for stratum, target in _targets(strata, sizes, fraction).items():
        for group in members[stratum]:
            if sizes[group] <= target:
                held[group] = True
                target -= int(sizes[group])
    # What strata of large groups could not give, others give.
    left = max(1, round(fraction * len(group_of))) - int(sizes[held].sum())
    for group in shuffled.tolist():
        if not held[group] and sizes[group] <= left:
            held[group] = True
            left -= int(sizes[group])
    if not held.any():
        held[shuffled[np.argmin(sizes[shuffled])]] = True
    return held[group_of]


def _targets(strata: np.ndarray, sizes: np.ndarray, fraction: float) -> dict[int, int]:
    """Rows to hold out of each stratum: together `fraction` of all, by largest remainders."""
    names, index = np.unique(strata, return_inverse=True)
    exact = np.bincount(index, weights=sizes) * fraction
    targets = np.floor(exact).astype(np.int64)
    missing = max(1, round(float(exact.sum()))) - int(targets.sum())
    targets[np.argsort(targets - exact, kind="stable")[:missing]] += 1
    return dict(zip(names.tolist(), targets.tolist(), strict=True))


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Numbers from 0 for equal keys, in the order in which they are met: int64, the shape of `keys`."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _keys(row: Conversation) -> tuple[int, int]:
    """What the row asks, and its label or else its last answer, each as 64 bits."""
    asked: list[str] = []
    for message in row.messages:
        if message["role"] in MODEL_ROLES:
            break
        asked.append(message["role"])
        asked.append(str(message.get("content")))
    label = row.label if row.label is not None else str(row.messages[-1].get("content"))
    return _hash(" ".join("\n".join(asked).casefold().split())), _hash(label)


def _characters(row: Row) -> int:
    if isinstance(row, Conversation):
        return sum(len(str(message.get("content"))) for message in row.messages)
    return len(row.what)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
