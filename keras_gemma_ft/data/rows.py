"""The one row type of the data rooms: a conversation, and where it came from."""

from dataclasses import dataclass
from typing import Any

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
    """

    messages: list[Message]
    origin: str
    label: str | None = None
    tools: list[dict[str, Any]] | None = None
