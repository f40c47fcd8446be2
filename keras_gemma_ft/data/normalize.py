"""Corrections that change how a row is written, not what it says: roles, Unicode, white space."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from keras_gemma_ft.data.rows import Conversation

_ROLES = {
    "user": ("human", "customer", "person", "question", "prompter"),
    "model": ("gpt", "chatgpt", "bot", "chatbot", "ai", "assistant", "agent", "answer"),
    "system": ("instruction", "instructions"),
    "tool": ("function", "observation", "function_response", "tool_response"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in (role, *names)}
_KNOWN = frozenset({"user", "model", "assistant", "system", "developer", "tool"})

# Characters without width, a byte order mark among them, and control characters but tab and line feed. The
# joiners U+200C and U+200D are letters' business.
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_TRAILING = re.compile("[ \t]+$", re.MULTILINE)


def fix_roles(row: Conversation) -> list[str]:
    """Gives messages the roles user, model, system and tool; says which unknown ones it replaced."""
    replaced: dict[str, None] = {}
    for message in _messages(row):
        role = message.get("role")
        if not isinstance(role, str) or role == "developer":
            continue
        known = _ROLE_OF.get(role.strip().lower())
        if known is not None:
            if role not in _KNOWN:
                replaced[f"role {role!r} is {known}"] = None
            message["role"] = known
    return list(replaced)


def normalize(row: Conversation) -> list[str]:
    """Writes the texts of a row in composed Unicode (NFC) and plain white space; says what it changed."""
    changed: dict[str, None] = {}

    def plain(text: str) -> str:
        composed = text if text.isascii() else unicodedata.normalize("NFC", text)
        if composed != text:
            changed["Unicode in composed form (NFC)"] = None
        spaced = plain_spaces(composed)
        if spaced != composed:
            changed["white space"] = None
        return spaced

    for message in _messages(row):
        for name in ("content", "reasoning", "reasoning_content"):
            if isinstance(message.get(name), str):
                message[name] = plain(message[name])
        if isinstance(message.get("content"), list):
            message["content"] = [
                {**part, "text": plain(part["text"])}
                if isinstance(part, dict) and isinstance(part.get("text"), str)
                else part
                for part in message["content"]
            ]
    return list(changed)


def plain_spaces(text: str) -> str:
    """The text with line feeds as line ends, plain spaces, nothing invisible and no space at a line's end."""
    text = _LINE_ENDS.sub("\n", text)
    if not text.isascii():
        text = _SPACES.sub(" ", text)
    return _TRAILING.sub("", _INVISIBLE.sub("", text)).strip()


def _messages(row: Conversation) -> list[dict[str, Any]]:
    """What of the messages is an object: rows come here before they are checked."""
    messages: Any = row.messages
    return (
        [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    )
