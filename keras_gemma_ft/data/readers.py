"""Reading: from what `data.train` names to conversations, one by one.

    >>> rows = read("train.csv", prompt="question", response="answer")
    >>> next(iter(rows)).messages
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]

A source gives records (`sources`, `formats`), a layout makes a conversation of each (`row_layouts`), and
`check` says whether that can be trained on.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import repeat
from typing import Any, Literal

from keras_gemma_ft.data.columns import TextTemplate
from keras_gemma_ft.data.files import NotHereError
from keras_gemma_ft.data.row_layouts import Columns, RowLayout, row_layout
from keras_gemma_ft.data.rows import Conversation, Problem, Row
from keras_gemma_ft.data.sources import Source, Stream, find
from keras_gemma_ft.data.split import Part, hold_out
from keras_gemma_ft.data.validate import check
from keras_gemma_ft.errors import UserError

__all__ = ["Part", "Reading", "conversations", "fingerprints", "hold_out", "read"]

OnError = Literal["stop", "skip"]
Tell = Callable[[str], None]
Repair = Callable[[Conversation], None]

# The fields of `data` that decide what conversations a source gives.
_SETTINGS = (
    "format",
    "layout",
    "prompt",
    "response",
    "messages",
    "template",
    "label",
    "weights",
    "row_weight",
)


def read(
    names: str,
    *,
    format: str = "auto",
    layout: str = "auto",
    prompt: str = "prompt",
    response: str = "response",
    messages: str | None = None,
    template: str | None = None,
    label: str | None = None,
    data_dir: str | None = None,
    on_error: OnError = "stop",
    tell: Tell | None = None,
) -> Reading:
    """The rows of files and datasets.

    Args:
        names: Files, patterns, `tfds:` and `hf:` datasets, separated by commas; see `sources`.
        format: Of files: a key of `formats.READERS`; auto: as each one's name and beginning tell.
        layout: One of `row_layouts.LAYOUTS`; auto: as the columns of each file's first row tell.
        prompt, response, messages, label: Columns; see `Columns`.
        template: The question as a text with columns in braces; see `TextTemplate`.
        data_dir: Where TensorFlow datasets lie.
        on_error: Whether the first row that is wrong stops the reading, or comes as a `Problem`.
        tell: Given a line for each file: how it is read.

    Raises:
        UserError: The template is malformed. A file that cannot be read, and a row that is wrong, are told
            when the rows are iterated.
    """
    question = None if template is None else TextTemplate(template)
    columns = Columns(prompt, response, messages, question, label)
    return Reading(find(names, format, data_dir), columns, layout, on_error=on_error, tell=tell)


def conversations(config: Mapping[str, Any], tell: Tell | None = None) -> tuple[Iterable[Row], Iterable[Row]]:
    """The training and the held-out rows of a config, which can be iterated again and again.

    Nothing is read before they are. With `data.on_error="skip"` there are problems among them.

    Args:
        config: As `keras_gemma_ft.config.validate` accepts it.
        tell: Given a line for each file: how it is read.

    Raises:
        UserError: The template, the weights or the names are malformed.
    """
    data = config["data"]
    reading, holding = readings(config, tell)
    training: Iterable[Row] = reading
    held_out: Iterable[Row] | None = holding
    if held_out is None:
        training, held_out = hold_out(reading, data["eval_fraction"], config["seed"])
    weighted = data["weights"] is not None or data["row_weight"] is not None
    return (Repeated(training) if weighted else training), held_out


def readings(
    config: Mapping[str, Any], tell: Tell | None = None, repair: Repair | None = None
) -> tuple[Reading, Reading | None]:
    """All rows that a config names for training, and those that it names for holding out, if it does.

    Args:
        config, tell: See `conversations`.
        repair: Given each conversation before it is checked; changes what is to be corrected.
    """
    data = config["data"]
    question = None if data["template"] is None else TextTemplate(data["template"])
    columns = Columns(
        data["prompt"],
        data["response"],
        data["messages"],
        question,
        data["label"],
        data["row_weight"],
        answer_is_label=config["task"]["kind"] == "classification",
    )

    def rows(sources: list[Source], columns: Columns, weights: Sequence[float] | None = None) -> Reading:
        return Reading(
            sources, columns, data["layout"], weights, config["seed"], data["on_error"], tell, repair
        )

    train, held_out = _sources(data)
    return (
        rows(train, columns, _weights(data["weights"], len(train))),
        # What is held out has each row once, and need not have the column.
        None if held_out is None else rows(held_out, replace(columns, weight=None)),
    )


def each_once(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config by which each row comes once, and those that are wrong as problems: for looking at rows."""
    return {**config, "data": {**config["data"], "on_error": "skip", "weights": None, "row_weight": None}}


def fingerprints(
    config: Mapping[str, Any], known: Mapping[str, str] | None = None, tell: Tell | None = None
) -> dict[str, str]:
    """What the rows of a config follow from: a hash of each source, and how the sources are read.

    Args:
        config: As for `conversations`.
        known: Hashes by name that stand in for sources that are not on this machine.
        tell: Given a line for each of those.

    Raises:
        UserError: A source cannot be read, or is both trained on and held out.
    """
    data = config["data"]
    train, held_out = _sources(data)
    hashes = {}
    for source in [*train, *(held_out or [])]:
        try:
            hashes[source.name] = source.fingerprint()
        except NotHereError as error:
            if source.name not in (known or {}):
                raise
            hashes[source.name] = (known or {})[source.name]
            if tell is not None:
                tell(f"{source.name}: {error.what}; the rows that were prepared from it are used")
    trained = {hashes[source.name] for source in train}
    for source in held_out or []:
        if hashes[source.name] in trained:
            raise UserError(
                f"the rows of {source.name} are training data, too",
                where="data.eval",
                remedy="give rows that are not trained on.",
            )
    settings = {name: data[name] for name in _SETTINGS} | {"task": config["task"]["kind"]}
    return {**hashes, "read as": json.dumps(settings)}


class Reading:
    """Rows that are read whenever they are iterated, the same ones in the same order each time.

    Args:
        sources: What is read, one after the other.
        columns: Where the rows hold what.
        layout: One of `row_layouts.LAYOUTS`, or auto.
        weights: Of each source: how often an epoch has its rows. With 1.5 it has each once, and half of them
            twice. None: all once.
        seed: Which rows an epoch has more often.
        on_error, tell: See `read`.
        repair: See `readings`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        columns: Columns,
        layout: str = "auto",
        weights: Sequence[float] | None = None,
        seed: int = 0,
        on_error: OnError = "stop",
        tell: Tell | None = None,
        repair: Repair | None = None,
    ) -> None:
        self.sources = sources
        self._columns = columns
        self._layout = layout
        self._weights = weights
        self._seed = seed
        self._on_error = on_error
        self._tell = tell
        self._repair = repair
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[Row]:
        """Conversations, and with `on_error="skip"` problems among them.

        Raises:
            UserError: A source cannot be read or is empty, or a row is wrong.
        """
        for number, source in enumerate(self.sources):
            rows = (row for stream in source.streams() for row in self._rows(stream))
            weight = 1.0 if self._weights is None else self._weights[number]
            yield from _weighted(rows, weight, random.Random(f"{self._seed} {number}"))

    def _rows(self, stream: Stream) -> Iterator[Row]:
        layout: RowLayout | None = None
        origin = None
        with closing(stream.records) as records:
            for origin, record in records:
                try:
                    if isinstance(record, UserError):
                        raise record
                    if layout is None:
                        layout = row_layout(self._layout, self._columns, record)
                        self._say(f"{stream.name}: {stream.format}, {layout.describe(record)}")
                    row = layout.conversation(record, origin)
                    if self._repair is not None:
                        self._repair(row)
                    check(row)
                except UserError as error:
                    where = f"{origin}, {error.where}" if error.where else origin
                    problem = Problem(error.what, where, error.remedy)
                    if self._on_error == "stop":
                        raise problem.error() from error
                    yield problem
                else:
                    yield row
        if origin is None:
            raise UserError("there are no rows", where=stream.name, remedy="give a file with rows.")

    def _say(self, line: str) -> None:
        if self._tell is not None and line not in self._told:
            self._told.add(line)
            self._tell(line)


class Repeated:
    """Rows as often as an epoch has them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            if isinstance(row, Problem):
                yield row
            else:
                yield from repeat(row, row.copies)


def _weighted(rows: Iterable[Row], weight: float, rng: random.Random) -> Iterator[Row]:
    for row in rows:
        if not isinstance(row, Problem):
            copies = weight * row.weight
            row.copies = math.floor(copies) + (rng.random() < copies % 1)
        yield row


def _sources(data: Mapping[str, Any]) -> tuple[list[Source], list[Source] | None]:
    """What is named for training, and for holding out if that is named."""
    train = find(data["train"], data["format"], data["data_dir"])
    if data["eval"] is None:
        return train, None
    held_out = find(data["eval"], data["format"], data["data_dir"])
    return train, held_out


def _weights(text: str | None, sources: int) -> list[float] | None:
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"{text!r} is no list of numbers above 0",
            where="data.weights",
            remedy="write, for example, 2,0.5.",
        )
    if len(weights) != sources:
        raise UserError(
            f"there are {len(weights)} weights for {sources} names in data.train",
            where="data.weights",
            remedy="give one for each.",
        )
    return weights
