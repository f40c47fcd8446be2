"""What every conversation must be before it is worth a token: messages that the template can lay out, and an
answer to learn."""

from __future__ import annotations

from typing import Any

from keras_gemma_ft.data.layout import MODEL_ROLES, SYSTEM_ROLES
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.errors import UserError

_OTHER_ROLES = ("user", *SYSTEM_ROLES)
_TEMPLATE = Template(thinking="keep")  # shows, and so checks, all of a row


def check(conversation: Conversation) -> None:
    """Accepts a conversation, or says what is wrong with it.

    Raises:
        UserError: A message cannot be laid out, the model says nothing in one of its messages, or there is
            none of the model. `where` names the message, counting from 1.
    """
    if _is_plainly_right(conversation):
        return
    messages = conversation.messages
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


def _is_plainly_right(conversation: Conversation) -> bool:
    """Whether each message is a known role with text and nothing more, and the model's say something.

    Most rows are such: they need not wait for the template, which knows what is right.
    """
    messages = conversation.messages
    if conversation.tools is not None or type(messages) is not list:
        return False
    answered = False
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return False
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or not (content.isascii() or _is_encodable(content)):
            return False
        if role in MODEL_ROLES:
            if not content or content.isspace():
                return False
            answered = True
        elif role not in _OTHER_ROLES:
            return False
    return answered


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
