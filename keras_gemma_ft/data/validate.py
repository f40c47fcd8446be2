"""What every conversation must be before it is worth a token: messages that the template can lay out, and an
answer to learn."""

from __future__ import annotations

from typing import Any

from keras_gemma_ft.data.layout import MODEL_ROLES, SYSTEM_ROLES
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.errors import UserError

_PLAIN_ROLES = ("user", *MODEL_ROLES, *SYSTEM_ROLES)
_TEMPLATE = Template(thinking="keep")  # shows, and so checks, all of a row


def check(conversation: Conversation) -> None:
    """Accepts a conversation, or says what is wrong with it.

    Raises:
        UserError: A message cannot be laid out, the model says nothing in one of its messages, or there is
            none of the model. `where` names the message, counting from 1.
    """
    messages = conversation.messages
    # The template itself judges what is not plainly right: it knows, and most rows need not wait for it.
    if conversation.tools is not None or not isinstance(messages, list) or not all(map(_is_plain, messages)):
        _TEMPLATE.script(messages, conversation.tools)
    answered = False
    for number, message in enumerate(messages, 1):
        if message["role"] in MODEL_ROLES:
            answered = True
            if not _says_something(message):
                raise UserError(
                    "the answer is empty",
                    where=f"message {number} ({message['role']})",
                    remedy="write what the model should answer, or delete the row.",
                )
    if not answered:
        raise UserError(
            "there is no answer to learn" if messages else "there are no messages",
            where="messages",
            remedy="add a message of role assistant (or model).",
        )


def _is_plain(message: Any) -> bool:
    """Whether it is a known role with text and nothing more, which the template is sure to take."""
    return (
        isinstance(message, dict)
        and len(message) == 2
        and type(content := message.get("content")) is str
        and (content.isascii() or _is_encodable(content))
        and message.get("role") in _PLAIN_ROLES
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _says_something(message: dict[str, Any]) -> bool:
    if message.get("tool_calls"):
        return True
    content = message.get("content") or ""
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["text"].strip() for part in content)
