"""A held-out conversation as evaluation sees it: what is asked, what was expected, and what must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from keras_gemma_ft.errors import UserError

Message = Mapping[str, Any]
_MODEL_ROLES = frozenset({"model", "assistant"})


class ConversationLike(Protocol):
    """What evaluation reads of a `keras_gemma_ft.data.rows.Conversation`."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def origin(self) -> str: ...


@dataclass(frozen=True)
class Example:
    """One held-out row.

    Attributes:
        prompt: The messages before the last model turn.
        reference: The content of the last model turn, stripped.
        origin: Where the row came from ("test.jsonl:7").
        constraints: What an answer must satisfy, see `instructions.py`; empty where nothing was asked.
    """

    prompt: tuple[Message, ...]
    reference: str
    origin: str = ""
    constraints: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_conversation(cls, conversation: ConversationLike) -> Example:
        """Cuts a conversation before its last model turn.

        Constraints are read from the last message's own field `constraints`.

        Raises:
            UserError: The conversation does not end in a model turn with something before it.
        """
        *prompt, last = conversation.messages
        if last["role"] not in _MODEL_ROLES or not prompt:
            raise UserError(
                "an evaluation row must end in an answer of the model, after something that asks for it",
                where=conversation.origin or None,
                remedy="add the expected answer as the last message (role 'model'), or remove the row.",
            )
        return cls(
            tuple(prompt), str(last["content"]).strip(), conversation.origin, last.get("constraints") or {}
        )

    @property
    def question(self) -> str:
        """The content of the last message before the answer."""
        return str(self.prompt[-1]["content"])
