"""Reading: from what `data.train` names to conversations, one by one.

    >>> rows = read("train.csv", prompt="question", response="answer")
    >>> next(iter(rows)).messages
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]

A source gives records (`sources`, `formats`), a layout makes a conversation of each (`row_layouts`), and
`check` says whether that can be trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from keras_gemma_ft.data.columns import TextTemplate
from keras_gemma_ft.data.row_layouts import Columns, conversation, describe, detect
from keras_gemma_ft.data.rows import Problem, Row
from keras_gemma_ft.data.sources import File, find
from keras_gemma_ft.data.split import Part, hold_out
from keras_gemma_ft.data.validate import check
from keras_gemma_ft.errors import UserError

__all__ = ["Part", "Reading", "hold_out", "read"]

OnError = Literal["stop", "skip"]
Tell = Callable[[str], None]

# The fields of `data` that decide what conversations a source gives.
_SETTINGS = ("format", "layout", "prompt", "response", "messages", "template", "label")


def read(
    data: str,
    *,
    format: str = "auto",
    layout: str = "auto",
    prompt: str = "prompt",
    response: str = "response",
    messages: str | None = None,
    template: str | None = None,
    label: str | None = None,
    on_error: OnError = "stop",
    tell: Tell | None = None,
) -> Reading:
    """The rows of files.

    Args:
        data: Paths or patterns, separated by commas.
        format: A key of `formats.READERS`; auto: as each file's name and beginning tell.
        layout: One of `row_layouts.LAYOUTS`; auto: as the columns of each file's first row tell.
        prompt, response, messages, label: Columns; see `Columns`.
        template: The question as a text with columns in braces; see `TextTemplate`.
        on_error: Whether the first row that is wrong stops the reading, or comes as a `Problem`.
        tell: Given a line for each file: how it is read.

    Raises:
        UserError: A pattern fits no file, or the template is malformed. A file that cannot be read, and a row
            that is wrong, are told when the rows are iterated.
    """
    columns = Columns(prompt, response, messages, None if template is None else TextTemplate(template), label)
    return Reading(find(data, format), columns, layout, on_error, tell)


def conversations(config: Mapping[str, Any], tell: Tell | None = None) -> tuple[Iterable[Row], Iterable[Row]]:
    """The training and the held-out rows of a config; nothing is read before they are iterated.

    Args:
        config: As `keras_gemma_ft.config.validate` accepts it.
        tell: Given a line for each file: how it is read.
    """
    data = config["data"]

    def rows(names: str) -> Reading:
        columns = Columns(
            data["prompt"],
            data["response"],
            data["messages"],
            None if data["template"] is None else TextTemplate(data["template"]),
            data["label"],
            answer_is_label=config["task"]["kind"] == "classification",
        )
        return Reading(find(names, data["format"]), columns, data["layout"], data["on_error"], tell)

    train = rows(data["train"])
    if data["eval"] is not None:
        return train, rows(data["eval"])
    return hold_out(train, data["eval_fraction"], config["seed"])


def fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """What the rows of a config follow from: a hash of each source, and how the sources are read.

    Raises:
        UserError: A source cannot be read.
    """
    data = config["data"]
    names = [name for name in (data["train"], data["eval"]) if name is not None]
    settings = {name: data[name] for name in _SETTINGS} | {"task": config["task"]["kind"]}
    return {
        **{source.name: source.fingerprint() for name in names for source in find(name, data["format"])},
        "read as": json.dumps(settings),
    }


class Reading:
    """Rows that are read whenever they are iterated, the same ones in the same order each time."""

    def __init__(
        self,
        sources: list[File],
        columns: Columns,
        layout: str = "auto",
        on_error: OnError = "stop",
        tell: Tell | None = None,
    ) -> None:
        self.sources = sources
        self._columns = columns
        self._layout = layout
        self._on_error = on_error
        self._tell = tell
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[Row]:
        """Conversations, and with `on_error="skip"` problems among them.

        Raises:
            UserError: A file cannot be read or is empty, or a row is wrong.
        """
        for source in self.sources:
            yield from self._rows(source)

    def _rows(self, source: File) -> Iterator[Row]:
        format_name, records = source.records()
        layout: str | None = None
        origin = None
        for origin, record in records:
            try:
                if isinstance(record, UserError):
                    raise record
                if layout is None:
                    layout = detect(record, self._columns) if self._layout == "auto" else self._layout
                    self._say(f"{source.name}: {format_name}, {describe(layout, record, self._columns)}")
                row = conversation(layout, record, self._columns, origin)
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
            raise UserError("there are no rows", where=source.name, remedy="give a file with rows.")

    def _say(self, line: str) -> None:
        if self._tell is not None and line not in self._told:
            self._told.add(line)
            self._tell(line)
