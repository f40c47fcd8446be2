"""Values of a record by column, and texts made of them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from keras_gemma_ft.errors import UserError

_NAMES = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}


def has_column(record: Mapping[str, Any], name: str) -> bool:
    """Whether a record has that column, or the object that dots reach into has that field."""
    return _find(record, name)[0]


def column(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column; `userInput.text` is the field `text` of the object in `userInput`.

    Raises:
        UserError: There is no such column.
    """
    found, value = _find(record, name)
    if not found:
        raise UserError(
            f"there is no column {name!r}; there are: {', '.join(map(str, record))}",
            remedy="name the right one in the config (data.prompt, data.response, …), or correct the row.",
        )
    return value


def text(record: Mapping[str, Any], name: str) -> str:
    """The text in a column.

    Raises:
        UserError: There is no such column, it holds something else, or nothing.
    """
    value = column(record, name)
    if not isinstance(value, str):
        raise UserError(f"is {kind(value)}, not text", where=f"column {name!r}", remedy=_quote(value))
    if not value.strip():
        raise UserError("is empty", where=f"column {name!r}", remedy="fill it, or delete the row.")
    return value


def optional_text(record: Mapping[str, Any], name: str) -> str:
    """The text in a column that may be missing, null or empty: then it is "".

    Raises:
        UserError: It holds something else.
    """
    return "" if record.get(name) in (None, "") else text({name: record[name] or " "}, name)


def kind(value: Any) -> str:
    """What a value is, in words."""
    return _NAMES.get(type(value)) or f"a number ({value})"


class TextTemplate:
    """A text with columns in braces: `Classify: {text}`.

    `{context.slots:none}` says "none" where a row has no such column, or nothing in it. A list is written
    with commas. `{{` and `}}` stand for braces.

    Raises:
        UserError: The text is no such template, or names no column.
    """

    def __init__(self, template: str) -> None:
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise _faulty(template, f"is malformed: {error}") from error
        if any(name == "" or conversion for _, name, _, conversion in parts):
            raise _faulty(template, "has braces that name no column")
        if all(name is None for _, name, _, _ in parts):
            raise _faulty(template, "names no column")
        self._parts = [(literal, name, default) for literal, name, default, _ in parts]

    def fill(self, record: Mapping[str, Any]) -> str:
        """The text for a record.

        Raises:
            UserError: A column is missing, empty or an object.
        """
        pieces: list[str] = []
        for literal, name, default in self._parts:
            pieces.append(literal)
            if name is not None:
                pieces.append(_filling(record, name, default or None))
        return "".join(pieces)


def _find(record: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    if name in record:
        return True, record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _filling(record: Mapping[str, Any], name: str, default: str | None) -> str:
    if default is not None and (not has_column(record, name) or column(record, name) in (None, "", [])):
        return default
    value = column(record, name)
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in items):
        raise UserError(f"is {kind(value)}, not text", where=f"column {name!r}", remedy=_quote(value))
    filling = ", ".join(map(str, items))
    if not filling.strip():
        raise UserError(
            "is empty",
            where=f"column {name!r}",
            remedy=f"fill it, delete the row, or write {{{name}:what to say instead}} in data.template.",
        )
    return filling


def _quote(value: Any) -> str:
    if isinstance(value, list | dict):
        return "write it as text (JSON as JSON text), or name another column."
    return f'write it as text, "{value}".' if value is not None else "fill it, or delete the row."


def _faulty(template: str, what: str) -> UserError:
    return UserError(
        f"{template!r} {what}",
        where="data.template",
        remedy='write columns in braces ("Classify: {text}"), and braces themselves twice.',
    )
