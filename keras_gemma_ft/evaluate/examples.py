"""A held-out conversation as evaluation sees it: what is asked, what was expected, and what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keras_gemma_ft.data.rows import Conversation, Message
from keras_gemma_ft.errors import UserError

_MODEL_ROLES = frozenset({"model", "assistant"})


@dataclass(frozen=True)
class Example:
    """One held-out row.

    Attributes:
        prompt: The messages before the last model turn.
        reference: The text of the last model turn, stripped.
        origin: Where the row came from ("test.jsonl:7").
        constraints: What an answer must satisfy, see `instructions.py`; empty where nothing was asked.
        tools: Declarations that the model is shown; None: there are none.
    """

    prompt: tuple[Message, ...]
    reference: str
    origin: str = ""
    constraints: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def from_conversation(cls, conversation: Conversation) -> Example:
        """Cuts a conversation before its last model turn.

        Constraints are read from the last message's own field `constraints`.

        Raises:
            UserError: The conversation does not end in a model turn with text, after something that asks
                for it.
        """
        *prompt, last = conversation.messages
        reference = text_of(last).strip()
        if last["role"] not in _MODEL_ROLES or not prompt or not reference:
            raise UserError(
                "an evaluation row must end in an answer of the model, after something that asks for it",
                where=conversation.origin or None,
                remedy="add the expected answer as the last message (role 'model'), or remove the row.",
            )
        constraints = last.get("constraints") or {}
        return cls(tuple(prompt), reference, conversation.origin, constraints, conversation.tools)

    @property
    def asked(self) -> Conversation:
        """What the model is given to answer."""
        return Conversation(list(self.prompt), self.origin, tools=self.tools)

    @property
    def question(self) -> str:
        """The text of the last message before the answer."""
        return text_of(self.prompt[-1])


def text_of(message: Message) -> str:
    """The text of a message whose content is a string, a list of text parts, or missing."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
