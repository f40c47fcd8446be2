"""Writes a cleaned copy of a dataset, and a log that says of every row that is not as it was, why.

    keras-gemma-ft data clean --config=configs/data/banking77.py --out=cleaned

    cleaned/train.jsonl   {"messages": [{"role": "user", …}, {"role": "model", …}], "label": …}
    cleaned/eval.jsonl    held out, or the cleaned `data.eval`
    cleaned/log.jsonl     {"row": "train.csv:90", "action": "dropped", "reason": "near duplicate of …"}

In this order: roles, Unicode and white space are corrected; rows that cannot be trained on are dropped, then
copies, and training rows that ask what a held-out one asks; a part is held out; classes are balanced. The
originals stay as they are, and the same config writes the same files. All rows are held in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keras_gemma_ft.data.dedupe import NearPairs, Sketches, near_pairs, similarities
from keras_gemma_ft.data.examine import asked, context, key, said
from keras_gemma_ft.data.normalize import fix_roles, normalize
from keras_gemma_ft.data.rows import Conversation, Problem, Row
from keras_gemma_ft.data.split import choose
from keras_gemma_ft.data.staging import staging
from keras_gemma_ft.data.table import classes_of
from keras_gemma_ft.errors import UserError

Balance = Literal["off", "down_sample", "weights"]


@dataclass(frozen=True)
class Change:
    """What became of a row.

    Attributes:
        row: Its place in the original.
        action: `dropped` or `changed`.
        reason: Why, or what of it.
    """

    row: str
    action: Literal["dropped", "changed"]
    reason: str


@dataclass
class Cleaned:
    """A cleaned dataset.

    Attributes:
        train, held_out: In the order of the original.
        weights: One for each training row, or None.
        log: Every dropped or changed row.
    """

    train: list[Conversation]
    held_out: list[Conversation]
    weights: list[float] | None
    log: list[Change]


class Repair:
    """Corrects rows before they are checked, and remembers what it changed.

    Attributes:
        changes: By the row's place.
    """

    def __init__(self, normalizes: bool = True) -> None:
        self._normalizes = normalizes
        self.changes: dict[str, list[str]] = {}

    def __call__(self, row: Conversation) -> None:
        done = fix_roles(row) + (normalize(row) if self._normalizes else [])
        if done:
            self.changes[row.origin] = done


def clean(
    train: Iterable[Row],
    held_out: Iterable[Row] | None = None,
    *,
    dedupe: Literal["off", "exact", "near"] = "near",
    similarity: float = 0.8,
    balance: Balance = "off",
    fraction: float = 0.1,
    seed: int = 0,
    changes: Mapping[str, Sequence[str]] | None = None,
) -> Cleaned:
    """Drops and divides rows.

    Args:
        train: Training rows; problems among them are dropped and logged.
        held_out: Held-out rows. None: a part of the training rows is held out, by label, so that rows whose
            questions are alike, directly or through others, are on one side.
        dedupe: Which copies are dropped: see `clean.dedupe` in the config.
        similarity: From which on questions, and answers, count as alike.
        balance: What is done about classes of unequal size, in the training part.
        fraction, seed: See `hold_out`.
        changes: What was corrected in a row, by its place, for the log.

    Raises:
        UserError: Nothing can be held out.
    """
    rows: list[Conversation] = []
    is_held: list[bool] = []
    dropped: dict[str, str] = {}
    places: list[str] = []  # in the order of the original
    for part, source in ((True, held_out), (False, train)):
        for row in source or ():
            if isinstance(row, Problem):
                places.append(row.where)
                dropped[row.where] = row.what
            else:
                places.append(row.origin)
                rows.append(row)
                is_held.append(part)
    held = np.array(is_held, bool)
    # Held-out rows come first: of two copies the training row goes.
    if dedupe != "off":
        rows, held = _drop(rows, held, _exact_copies(rows, held), dropped)
    while dedupe == "near":
        reasons = _near_copies(rows, held, similarity)
        if not reasons:
            break
        # Whom the dropped row resembled may now resemble no one, or another one first: look again.
        rows, held = _drop(rows, held, reasons, dropped)
    if held_out is None:
        held = _chosen(rows, similarity, fraction, seed)
    weights = None
    training = [row for row, is_held in zip(rows, held.tolist(), strict=True) if not is_held]
    classes = classes_of([row.label for row in training], [said(row) for row in training])
    if classes and balance == "down_sample":
        training = _down_sample(training, classes, seed, dropped)
    elif classes and balance == "weights":
        sizes = Counter(classes)
        weights = [round(len(classes) / (len(sizes) * sizes[name]), 4) for name in classes]
    log = [
        Change(place, "dropped", dropped[place])
        if place in dropped
        else Change(place, "changed", "; ".join(changes[place]))  # type: ignore[index]
        for place in places
        if place in dropped or place in (changes or ())
    ]
    return Cleaned(
        training, [row for row, is_held in zip(rows, held.tolist(), strict=True) if is_held], weights, log
    )


def main(config: Mapping[str, Any], out: Path) -> Cleaned:
    """Cleans what a config names and writes it into a directory of its own.

    Args:
        config: As `keras_gemma_ft.config.validate` accepts it.
        out: Must not exist, or be empty.

    Raises:
        UserError: There is something already, a file cannot be read, nothing is left, or the directory cannot
            be written.
    """
    from keras_gemma_ft.data.readers import each_once, readings

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "there is something already",
            where=str(out),
            remedy="give another directory: data clean changes nothing that is there.",
        )
    data, settings = config["data"], config["clean"]
    repair = Repair(settings["normalize"])
    train, held_out = readings(each_once(config), print, repair)
    cleaned = clean(
        train,
        held_out,
        dedupe=settings["dedupe"],
        similarity=settings["similarity"],
        balance=settings["balance"],
        fraction=data["eval_fraction"],
        seed=config["seed"],
        changes=repair.changes,
    )
    if not cleaned.train:
        raise UserError(
            f"nothing is left to train: {len(cleaned.log):,} rows were dropped",
            where=data["train"],
            remedy="see `keras-gemma-ft data inspect`.",
        )
    with staging(out, "the cleaned data") as place:
        _write(place / "train.jsonl", records(cleaned.train, cleaned.weights))
        _write(place / "eval.jsonl", records(cleaned.held_out))
        _write(place / "log.jsonl", (vars(change) for change in cleaned.log))
    for line in summary(cleaned):
        print(line)
    print(f"{out / 'train.jsonl'}, eval.jsonl, log.jsonl")
    return cleaned


def records(rows: Iterable[Conversation], weights: Iterable[float] | None = None) -> Iterator[dict[str, Any]]:
    """Rows as JSON objects: messages, and label, tools and weight where there are any."""
    weighted = iter(weights) if weights is not None else None
    for row in rows:
        record: dict[str, Any] = {"messages": row.messages}
        if row.label is not None:
            record["label"] = row.label
        if row.tools:
            record["tools"] = row.tools
        if weighted is not None:
            record["weight"] = next(weighted)
        yield record


def summary(cleaned: Cleaned) -> list[str]:
    """What was done, a line each."""
    kinds = Counter((change.action, change.reason.split(":")[0]) for change in cleaned.log)
    lines = [f"{count:,} {action}: {reason}" for (action, reason), count in kinds.most_common()]
    return [*lines, f"{len(cleaned.train):,} rows to train on, {len(cleaned.held_out):,} held out"]


def _exact_copies(rows: Sequence[Conversation], held: np.ndarray) -> dict[int, str]:
    """Rows to drop, with the reason; the first of equal ones stays."""
    reasons: dict[int, str] = {}
    first: dict[tuple[int, int, bool], int] = {}
    held_questions: dict[int, int] = {}
    for number, row in enumerate(rows):
        question, is_held = key(context(row)), bool(held[number])
        earlier = first.setdefault((question, key(said(row)), is_held), number)
        if earlier != number:
            reasons[number] = f"copy: the same as {rows[earlier].origin}"
        elif is_held:
            held_questions.setdefault(question, number)
        elif question in held_questions:
            reasons[number] = f"held out: {rows[held_questions[question]].origin} asks the same"
    return reasons


def _near_copies(rows: Sequence[Conversation], held: np.ndarray, similarity: float) -> dict[int, str]:
    near = _near(rows, similarity)
    answers = [said(row) for row in rows]
    same = np.fromiter(map(key, answers), np.uint64, len(rows))
    agree = same[near.first] == same[near.second]
    if classes_of([row.label for row in rows], answers) is None:
        agree |= similarities(Sketches.of(answers), near.first, near.second) >= similarity
    reasons: dict[int, str] = {}
    pairs = zip(
        near.first.tolist(), near.second.tolist(), near.similarity.tolist(), agree.tolist(), strict=True
    )
    for first, second, alike, agrees in pairs:  # by the second, so that the first is decided
        if first in reasons or second in reasons:
            continue
        if held[first] and not held[second]:
            reasons[second] = f"held out: {rows[first].origin} asks nearly the same ({alike:.2f})"
        elif agrees and held[first] == held[second]:
            reasons[second] = f"near copy: of {rows[first].origin} ({alike:.2f})"
    return reasons


def _drop(
    rows: list[Conversation], held: np.ndarray, reasons: Mapping[int, str], dropped: dict[str, str]
) -> tuple[list[Conversation], np.ndarray]:
    dropped |= {rows[number].origin: reason for number, reason in reasons.items()}
    kept = [number for number in range(len(rows)) if number not in reasons]
    return [rows[number] for number in kept], held[kept]


def _near(rows: Sequence[Conversation], similarity: float) -> NearPairs:
    return near_pairs(Sketches.of([asked(row) or said(row) for row in rows]), similarity)


def _chosen(rows: Sequence[Conversation], similarity: float, fraction: float, seed: int) -> np.ndarray:
    """bool [rows]: what is held out."""
    _, group_of = np.unique(_near(rows, similarity).group, return_inverse=True)
    names = [row.label if row.label is not None else said(row) for row in rows]
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    stratum_of = np.array([number[name] for name in names], np.int64)
    return choose(group_of, stratum_of, fraction, seed)


def _down_sample(
    rows: Sequence[Conversation], classes: Sequence[str], seed: int, dropped: dict[str, str]
) -> list[Conversation]:
    """As many rows of each class as the smallest has."""
    least = min(Counter(classes).values())
    rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, 1], np.uint64)))
    kept: set[int] = set()
    for name in sorted(set(classes)):
        members = [number for number, each in enumerate(classes) if each == name]
        kept |= set(rng.choice(members, least, replace=False).tolist())
    for number, row in enumerate(rows):
        if number not in kept:
            dropped[row.origin] = f"balance: {classes[number]} keeps {least:,} rows"
    return [rows[number] for number in sorted(kept)]


def _write(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    # Half of a surrogate pair, in a field that is not trained on, becomes its JSON escape.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
