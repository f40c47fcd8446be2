"""What stands out in a dataset, by kind: each finding names its rows, and says what to do.

Every function here takes the table of examined rows and gives at most one finding. None of them changes or
forbids anything: what is a fault in one dataset is meant so in another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from keras_gemma_ft.data.examine import printable
from keras_gemma_ft.data.table import Table, class_counts

Level = Literal["error", "warning", "note"]
# Largest class by smallest, and rows that a class should have.
_IMBALANCE = 10
_FEWEST_OF_CLASS = 10
_REPEATED = 5  # questions with one and the same answer
_MAIN_LANGUAGE = 0.8  # share of the rows whose language is known
_FENCE = 3  # interquartile ranges of the length's logarithm (Tukey's far out)
_ROWS_FOR_OUTLIERS = 20


@dataclass(frozen=True)
class Finding:
    """One kind of thing that stands out.

    Attributes:
        kind: Its name in `inspect.json`.
        level: `error`: rows are lost, or results will be wrong; `warning`: look at it; `note`: good to know.
        title: Which rows these are.
        remedy: What to do about it, or what it means.
        rows: The rows (or classes) concerned: where each is, and what about it.
    """

    kind: str
    level: Level
    title: str
    remedy: str
    rows: list[tuple[str, str]] = field(repr=False)


def all_findings(table: Table) -> list[Finding]:
    """Everything that stands out: errors first, then warnings, then notes."""
    found = [
        _problems(table),
        _same_in_both(table),
        _alike_in_both(table),
        _conflicts(table),
        _alike_but_answered_otherwise(table),
        _duplicates(table),
        _near_duplicates(table),
        _too_long(table),
        _spelled(table),
        _empty(table),
        _imbalance(table),
        _repeated_answers(table),
        _personal(table),
        _other_languages(table),
        _odd_lengths(table),
    ]
    levels = ("error", "warning", "note")
    return sorted(filter(None, found), key=lambda finding: levels.index(finding.level))


def _problems(table: Table) -> Finding | None:
    rows = [
        (printable(problem.where), printable("; ".join(filter(None, (problem.what, problem.remedy)))))
        for problem in table.problems
    ]
    return _finding(
        "problem",
        "error",
        rows,
        "Rows that cannot be trained on",
        "Correct them. data.on_error=skip leaves them out; data clean drops them and logs each.",
    )


def _same_in_both(table: Table) -> Finding | None:
    first = _first_of_part(table, 0, table.question_keys)
    leaked = [row for row in _rows_of(table, 1) if table.question_keys[row] in first]

    def say(row: int) -> str:
        return f"asks the same as {table.origins[first[table.question_keys[row]]]}: {table.questions[row]}"

    return _finding(
        "leakage",
        "error",
        table.at(leaked, say),
        "Held-out rows that ask exactly what a training row asks",
        "Results on them say nothing about new questions. data clean leaves no question on both sides.",
    )


def _alike_in_both(table: Table) -> Finding | None:
    trained_keys = set(_first_of_part(table, 0, table.question_keys))
    group = table.near.group
    trained_groups = set(group[table.part == 0].tolist())
    leaked = [
        row
        for row in _rows_of(table, 1)
        if group[row] in trained_groups and table.question_keys[row] not in trained_keys
    ]
    closest, closest_trained = table.partners()

    def say(row: int) -> str:
        other, similarity = closest_trained.get(row) or closest[row]
        return f"{similarity:.2f} like {table.origins[other]}: {_compared(table, row, other)}"

    return _finding(
        "near_leakage",
        "warning",
        table.at(leaked, say),
        "Held-out rows that ask nearly what a training row asks",
        "Results on them flatter the model. data clean leaves no near duplicates on both sides.",
    )


def _conflicts(table: Table) -> Finding | None:
    by_question = defaultdict(list)
    for row, key in enumerate(table.question_keys):
        by_question[key].append(row)
    rows, others = [], {}
    for same in by_question.values():
        if len({table.answer_keys[row] for row in same}) > 1:
            rows += same
            for row in same:
                others[row] = next(r for r in same if table.answer_keys[r] != table.answer_keys[row])

    def say(row: int) -> str:
        other = others[row]
        return (
            f"“{table.answers[row]}”, but {table.origins[other]} “{table.answers[other]}”: "
            f"{table.questions[row]}"
        )

    return _finding(
        "conflict",
        "warning" if table.classes else "note",
        table.at(sorted(rows), say),
        "Rows that answer the same question in different ways",
        "Decide for one class, or drop them: the model cannot learn both."
        if table.classes
        else "Fine if several answers are right; contradictions teach guessing.",
    )


def _alike_but_answered_otherwise(table: Table) -> Finding | None:
    if not table.classes:
        return None
    near = table.near
    other: dict[int, tuple[int, float]] = {}
    for a, b, similarity in zip(
        near.first.tolist(), near.second.tolist(), near.similarity.tolist(), strict=True
    ):
        if (
            table.answer_keys[a] != table.answer_keys[b]
            and table.question_keys[a] != table.question_keys[b]
            and similarity > other.get(b, (0, 0.0))[1]
        ):
            other[b] = a, similarity

    def say(row: int) -> str:
        a, similarity = other[row]
        return (
            f"“{table.answers[row]}”, but {table.origins[a]} ({similarity:.2f} alike) “{table.answers[a]}”: "
            f"{_compared(table, row, a)}"
        )

    return _finding(
        "near_conflict",
        "note",
        table.at(sorted(other), say),
        "Rows that nearly ask what a row of another class asks",
        "Often a wrong label, sometimes the one word that matters. Worth a look.",
    )


def _duplicates(table: Table) -> Finding | None:
    pairs = list(zip(table.part.tolist(), table.question_keys, table.answer_keys, strict=True))
    first: dict[tuple[int, int, int], int] = {}
    rows = [row for row, pair in enumerate(pairs) if first.setdefault(pair, row) != row]
    return _finding(
        "duplicate",
        "warning",
        table.at(rows, lambda row: f"the same as {table.origins[first[pairs[row]]]}: {table.questions[row]}"),
        "Rows that repeat an earlier one, question and answer",
        "They count several times. data clean drops them.",
    )


def _near_duplicates(table: Table) -> Finding | None:
    group = table.near.group.tolist()
    first: dict[tuple[int, int], int] = {}
    asked: set[tuple[int, int]] = set()
    rows = []
    for row, part in enumerate(table.part.tolist()):
        met = first.setdefault((part, group[row]), row) != row
        question = part, table.question_keys[row]
        if met and question not in asked:
            rows.append(row)
        asked.add(question)
    closest, _ = table.partners()

    def say(row: int) -> str:
        other, similarity = closest[row]
        return f"{similarity:.2f} like {table.origins[other]}: {_compared(table, row, other)}"

    return _finding(
        "near_duplicate",
        "note",
        table.at(rows, say),
        "Rows that ask nearly what an earlier one asks",
        "data clean drops those whose answers agree as well.",
    )


def _too_long(table: Table) -> Finding | None:
    rows = np.flatnonzero(table.tokens > table.max_length).tolist()
    return _finding(
        "too_long",
        "warning",
        table.at(rows, lambda row: f"{table.tokens[row]:,} tokens: {table.questions[row]}"),
        f"Rows longer than {table.max_length:,} tokens",
        "data.truncation says what becomes of them; a larger data.max_length keeps them whole.",
    )


def _spelled(table: Table) -> Finding | None:
    spelled = table.array("spelled")
    rows = np.flatnonzero(spelled).tolist()
    return _finding(
        "control_tokens",
        "warning",
        table.at(rows, lambda row: f"{spelled[row]} spelled: {table.questions[row]}"),
        "Rows that spell control tokens such as <|turn>",
        "They are encoded as ordinary text and do no harm; find out how they came into the data.",
    )


def _empty(table: Table) -> Finding | None:
    rows = np.flatnonzero(table.array("empty")).tolist()
    return _finding(
        "empty_answer",
        "warning",
        table.at(rows, lambda row: table.questions[row]),
        "Rows without an answer",
        "They teach the model to say nothing. Drop them unless that is meant.",
    )


def _imbalance(table: Table) -> Finding | None:
    if not table.classes:
        return None
    trained, held_out = class_counts(table)
    largest, most = trained.most_common(1)[0] if trained else ("", 0)
    rows = []
    for name in sorted(set(trained) | set(held_out)):
        count = trained[name]
        if not count:
            rows.append((name, f"{held_out[name]:,} rows held out, none to train on"))
        elif count * _IMBALANCE <= most or count < _FEWEST_OF_CLASS:
            rows.append((name, f"{count:,} rows to train on, the largest class ({largest}) has {most:,}"))
    return _finding(
        "imbalance",
        "warning",
        rows,
        f"Classes with fewer than {_FEWEST_OF_CLASS} rows, or than a tenth of the largest",
        "Collect more of them, or let data clean balance the classes (clean.balance).",
    )


def _repeated_answers(table: Table) -> Finding | None:
    if table.classes:
        return None
    questions: dict[int, set[int]] = defaultdict(set)
    for question, answer in zip(table.question_keys, table.answer_keys, strict=True):
        questions[answer].add(question)
    rows = [row for row, key in enumerate(table.answer_keys) if len(questions[key]) >= _REPEATED]

    def say(row: int) -> str:
        times = len(questions[table.answer_keys[row]])
        return f"“{table.answers[row]}”, as to {times - 1:,} other questions: {table.questions[row]}"

    return _finding(
        "repeated_answer",
        "note",
        table.at(rows, say),
        f"Rows with an answer that {_REPEATED} or more questions get",
        "Refusals and stock phrases crowd out the rest if there are many.",
    )


def _personal(table: Table) -> Finding | None:
    rows = [row for row, found in enumerate(table.personal) if found]

    def say(row: int) -> str:
        return "; ".join(f"{kind} {', '.join(found)}" for kind, found in table.personal[row].items())

    return _finding(
        "personal",
        "warning",
        table.at(rows, say),
        "Rows with what looks like personal data",
        "Models repeat what they were trained on. Check whether it may be there.",
    )


def _other_languages(table: Table) -> Finding | None:
    known = Counter(name for name in table.languages if name is not None)
    if not known:
        return None
    main, count = known.most_common(1)[0]
    if count < _MAIN_LANGUAGE * known.total():
        return None
    rows = [row for row, name in enumerate(table.languages) if name not in (None, main)]
    return _finding(
        "language",
        "note",
        table.at(rows, lambda row: f"{table.languages[row]}: {table.questions[row]}"),
        f"Rows that are not in {main}, as the others are",
        "Fine if meant; else leave them out.",
    )


def _odd_lengths(table: Table) -> Finding | None:
    if len(table) < _ROWS_FOR_OUTLIERS:
        return None
    logs = np.log2(table.tokens)
    low, high = np.quantile(logs, [0.25, 0.75])
    spread = _FENCE * max(high - low, 0.1)
    rows = np.flatnonzero((logs < low - spread) | (logs > high + spread)).tolist()
    median = int(np.median(table.tokens))
    return _finding(
        "length",
        "note",
        table.at(rows, lambda row: f"{table.tokens[row]:,} tokens: {table.questions[row]}"),
        f"Rows far shorter or longer than the others (median {median:,} tokens)",
        "Often pasted logs, or rows cut short.",
    )


def _finding(kind: str, level: Level, rows: list[tuple[str, str]], title: str, remedy: str) -> Finding | None:
    return Finding(kind, level, title, remedy, rows) if rows else None


def _first_of_part(table: Table, part: int, keys: Sequence[int]) -> dict[int, int]:
    first: dict[int, int] = {}
    for row in _rows_of(table, part):
        first.setdefault(keys[row], row)
    return first


def _rows_of(table: Table, part: int) -> list[int]:
    return np.flatnonzero(table.part == part).tolist()


def _compared(table: Table, row: int, other: int) -> str:
    return f"{table.questions[row]} ~ {table.questions[other]}"
