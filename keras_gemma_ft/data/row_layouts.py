"""Layouts of rows: which columns hold a conversation, and how.

    messages         a list of messages: role and content, or ShareGPT's from and value
    prompt_response  a question, or a text template over columns, and an answer
    alpaca           instruction, input (may be empty) and output
    spans            a text, and named stretches of it, to be answered as a JSON object

Rows of all but the first may have a `system` text; those of the first two `tools`, and a `reasoning`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from keras_gemma_ft.data.columns import TextTemplate, column, has_column, kind, optional_text, text
from keras_gemma_ft.data.rows import Conversation, Message
from keras_gemma_ft.data.spans import answer_of_spans
from keras_gemma_ft.errors import UserError

_CHATS = ("messages", "conversations")
# ShareGPT's names for who speaks, where they are not ours.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Columns:
    """Where a row holds what. Dots reach into objects: `userInput.text`.

    Attributes:
        prompt: The question, or with spans the text.
        response: The answer, or the spans. `response` is also found under the name of `completion`.
        messages: The list of messages; None: `messages`, or else `conversations`.
        template: The question made of columns; None: `prompt` as it is.
        label: The row's class; None: it has none.
        weight: How often an epoch has the row; None: as often as all others.
        answer_is_label: Whether the answer is the row's class where `label` is None.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    template: TextTemplate | None = None
    label: str | None = None
    weight: str | None = None
    answer_is_label: bool = False

    def found_in(self, record: Mapping[str, Any]) -> Columns:
        """With the other names for messages and answers where a record has those."""
        chat = self.messages or next((name for name in _CHATS if name in record), _CHATS[0])
        is_completion = self.response == Columns.response and self.response not in record
        answer = "completion" if is_completion and "completion" in record else self.response
        return replace(self, messages=chat, response=answer)


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a file become conversations.

    Attributes:
        name: A key of `LAYOUTS`.
        columns: Where they hold what.
    """

    name: str
    columns: Columns

    def conversation(self, record: Mapping[str, Any], origin: str) -> Conversation:
        """A record as a conversation.

        Raises:
            UserError: The record lacks a column, or has something else in it.
        """
        messages, label = _LAYOUTS[self.name](record, self.columns)
        if self.columns.label is not None:
            label = _label(record, self.columns.label)
        elif not self.columns.answer_is_label:
            label = None
        tools = record.get("tools")
        weight = 1.0 if self.columns.weight is None else _weight(record, self.columns.weight)
        return Conversation(messages, origin, label, _json(tools, "tools") if tools else None, weight)

    def describe(self, record: Mapping[str, Any]) -> str:
        """How a record is read, in words."""
        if self.name == "messages":
            return f"messages in {self.columns.messages!r}"
        if self.name == "alpaca":
            return "instruction, input and output"
        asked = "data.template" if self.columns.template is not None else repr(self.columns.prompt)
        spans = " (spans)" if self.name == "spans" else ""
        system = ", with 'system'" if "system" in record else ""
        return f"{asked} answered by {self.columns.response!r}{spans}{system}"


def row_layout(name: str, columns: Columns, record: Mapping[str, Any]) -> RowLayout:
    """The layout of that name for the rows of a file, or with `auto` the one that a row's columns tell.

    Raises:
        UserError: They tell none.
    """
    found = columns.found_in(record)
    if name in ("messages", "alpaca") and columns.template is not None:
        raise UserError(
            f"the layout {name} has its own questions",
            where="data.template",
            remedy="leave it out, or set data.layout to prompt_response.",
        )
    if name != "auto":
        return RowLayout(name, found)
    # Columns that were asked for by name come before those that a row happens to have.
    pairs = columns.template is not None or (columns.prompt, columns.response) != ("prompt", "response")
    if columns.messages is not None or (not pairs and has_column(record, found.messages or "")):
        return RowLayout("messages", found)
    has_prompt, has_response = has_column(record, found.prompt), has_column(record, found.response)
    if columns.template is not None or (has_prompt and has_response):
        return RowLayout("prompt_response", found)
    if not pairs and "instruction" in record and "output" in record:
        return RowLayout("alpaca", found)
    raise UserError(
        f"there is no column {(found.response if has_prompt else found.prompt)!r}; "
        f"there are: {', '.join(map(str, record))}",
        remedy="name the columns of questions and answers in data.prompt and data.response.",
    )


_Parts = tuple[list[Message], str | None]
"""The messages, and the answer where there is but one."""


def _messages(record: Mapping[str, Any], columns: Columns) -> _Parts:
    assert columns.messages is not None, "found_in gave it a name"
    return _chat(column(record, columns.messages), columns.messages), None


def _prompt_response(record: Mapping[str, Any], columns: Columns) -> _Parts:
    answers = columns.response
    if columns.template is not None:
        return _exchange(record, columns.template.fill(record), text(record, answers))
    asked = column(record, columns.prompt)
    if isinstance(asked, list):  # messages, and those that go on from there
        return _chat(asked, columns.prompt) + _chat(column(record, answers), answers), None
    return _exchange(record, text(record, columns.prompt), text(record, answers))


def _alpaca(record: Mapping[str, Any], columns: Columns) -> _Parts:
    instruction, given = text(record, "instruction"), optional_text(record, "input")
    return _exchange(record, f"{instruction}\n\n{given}" if given else instruction, text(record, "output"))


def _spans(record: Mapping[str, Any], columns: Columns) -> _Parts:
    source = text(record, columns.prompt)
    found = column(record, columns.response) if has_column(record, columns.response) else []
    asked = columns.template.fill(record) if columns.template is not None else source
    return _exchange(record, asked, answer_of_spans(source, found))


_LAYOUTS: dict[str, Callable[[Mapping[str, Any], Columns], _Parts]] = {
    "messages": _messages,
    "prompt_response": _prompt_response,
    "alpaca": _alpaca,
    "spans": _spans,
}
LAYOUTS = tuple(_LAYOUTS)


def _exchange(record: Mapping[str, Any], asked: str, answer: str) -> _Parts:
    said: Message = {"role": "assistant", "content": answer}
    for name in ("reasoning", "reasoning_content"):
        if record.get(name):
            said[name] = record[name]
    messages = [{"role": "user", "content": asked}, said]
    if "system" in record and (system := optional_text(record, "system")):
        messages.insert(0, {"role": "system", "content": system})
    return messages, answer


def _chat(value: Any, name: str) -> list[Message]:
    value = _json(value, name)
    if not isinstance(value, list):
        raise UserError(
            f"is {kind(value)}, not a list of messages",
            where=f"column {name!r}",
            remedy='write [{"role": "user", "content": …}, {"role": "assistant", "content": …}].',
        )
    if value and isinstance(value[0], dict) and "from" in value[0] and "role" not in value[0]:
        return [_sharegpt(message, number) for number, message in enumerate(value, 1)]
    return value


def _sharegpt(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        raise UserError("has no speaker", where=f"message {number}", remedy='write {"from": …, "value": …}.')
    speaker, said = message["from"], message.get("value")
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    role = {"role": _SPEAKERS.get(speaker, speaker)}
    if speaker == "function_call":
        calls = _json(said, f"value of message {number}")
        calls = calls if isinstance(calls, list) else [calls]
        return {**role, "tool_calls": [{"function": call} for call in calls], **others}
    return {**role, "content": said, **others}


def _json(value: Any, name: str) -> Any:
    """A value, or what its JSON text holds: that is how a cell of CSV has a list."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(
            "is text, but not JSON", where=f"column {name!r}", remedy="write a JSON list."
        ) from error


def _weight(record: Mapping[str, Any], name: str) -> float:
    value = column(record, name)
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(
            f"is {kind(value)}, not a number from 0 on",
            where=f"column {name!r}",
            remedy="say how often an epoch has the row, or unset data.row_weight.",
        )
    return weight


def _label(record: Mapping[str, Any], name: str) -> str:
    value = column(record, name)
    if not isinstance(value, str | int) or value == "":
        what = "is empty" if value in (None, "") else f"is {kind(value)}, not a class"
        raise UserError(
            what, where=f"column {name!r}", remedy="give every row its class, or unset data.label."
        )
    return str(value)
