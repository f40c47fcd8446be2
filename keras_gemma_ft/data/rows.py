"""A row of the data rooms: a conversation, or what is wrong with it, and where it came from."""

from dataclasses import dataclass
from typing import Any

from keras_gemma_ft.errors import UserError

Message = dict[str, Any]
"""One message: `role`, `content` (str, list of text parts, or None), and optionally `reasoning` or
`reasoning_content` (str), `tool_calls`, `name`, `tool_call_id`."""


@dataclass(slots=True)
class Conversation:
    """One training example, as the readers produce it and the template renders it.

    A row of `train.jsonl` such as `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
    "content": "Hello!"}]}` on line 7 becomes `Conversation(messages=[...], origin="train.jsonl:7")`.

    Attributes:
        messages: The messages in order; roles system, developer, user, model, assistant or tool.
        origin: Place of the row for error messages: file and line, or dataset and row number.
        label: Class of the row where the task has one: used to stratify, balance and score, never rendered.
        tools: Tool declarations (JSON-schema style function objects) rendered at the top, or None.
        weight: How often an epoch has it, relative to the other rows of its source.
        copies: How often this epoch's rows have it: a whole number that is drawn by the weights.
    """

    messages: list[Message]
    origin: str
    label: str | None = None
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    copies: int = 1


@dataclass(slots=True)
class Problem:
    """A row that cannot be trained on: what is wrong, where, and what to do."""

    what: str
    where: str
    remedy: str | None

    def error(self) -> UserError:
        return UserError(self.what, where=self.where, remedy=self.remedy)


Row = Conversation | Problem
"""What a reader gives for each row of its files."""
