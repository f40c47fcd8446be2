"""How Gemma 4's chat template spells tool declarations, calls and their values.

Keys are bare and sorted regardless of case, strings stand between `<|"|>` marks:

    call:add{a:1.5,xs:[<|"|>p<|"|>],n:null}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from keras_gemma_ft.errors import UserError

QUOTE = '<|"|>'
# Deeper values than any real schema; JSON's own limit would end in a RecursionError.
_DEEPEST = 50

Emit = Callable[[str], None]


class ValueWriter:
    """Writes values into a conversation: text through `say`, the control token `<|"|>` through `mark`."""

    def __init__(self, say: Emit, mark: Emit) -> None:
        self._say = say
        self._mark = mark

    def string(self, text: str) -> None:
        self._mark(QUOTE)
        self._say(text)
        self._mark(QUOTE)

    def value(self, value: Any, depth: int = 0) -> None:
        """A value of JSON: null, true, 1.5, quoted text, `{...}` or `[...]`."""
        if depth > _DEEPEST:
            raise UserError(
                f"a tool's value is nested more than {_DEEPEST} deep",
                remedy="flatten the arguments or the schema.",
            )
        if value is None:
            self._say("null")
        elif isinstance(value, bool):
            self._say("true" if value else "false")
        elif isinstance(value, str):
            self.string(value)
        elif isinstance(value, Mapping):
            self._say("{")
            self.fields(value, depth)
            self._say("}")
        elif isinstance(value, list | tuple):
            self._say("[")
            for n, item in enumerate(value):
                self._say("," if n else "")
                self.value(item, depth + 1)
            self._say("]")
        else:
            self._say(str(value))

    def fields(self, mapping: Mapping[str, Any], depth: int = 0) -> None:
        """`key:value` pairs, sorted, without the braces."""
        for n, (key, value) in enumerate(_sorted(mapping)):
            self._say(f"{',' if n else ''}{key}:")
            self.value(value, depth + 1)

    def schema(self, node: Any, depth: int = 0) -> None:
        """A JSON schema: the keywords that Gemma 4 was shown, in alphabetical order, the type in capitals."""
        node = _mapping(node, "a tool's parameter")
        if depth > _DEEPEST:
            raise UserError(
                f"a tool's schema is nested more than {_DEEPEST} deep", remedy="flatten the parameters."
            )
        separator = "{"

        def keyword(name: str) -> None:
            nonlocal separator
            self._say(f"{separator}{name}:")
            separator = ","

        if node.get("description"):
            keyword("description")
            self.value(node["description"])
        if node.get("enum"):
            keyword("enum")
            self.value(node["enum"])
        if isinstance(node.get("items"), Mapping):
            keyword("items")
            self.schema(node["items"], depth + 1)
        if node.get("nullable"):
            keyword("nullable")
            self._say("true")
        if node.get("properties"):
            keyword("properties")
            self._say("{")
            for n, (name, child) in enumerate(_sorted(_mapping(node["properties"], "`properties`"))):
                self._say(f"{',' if n else ''}{name}:")
                self.schema(child, depth + 1)
            self._say("}")
        if node.get("required"):
            keyword("required")
            self.value(node["required"])
        if node.get("type"):
            keyword("type")
            self.string(str(node["type"]).upper())
        self._say("{}" if separator == "{" else "}")

    def declaration(self, tool: Any) -> None:
        """A tool, as `{"type": "function", "function": {"name": ..., ...}}`."""
        function = _mapping(_mapping(tool, "a tool").get("function"), "a tool's `function`")
        self._mark("<|tool>")
        self._say(f"declaration:{_name(function)}{{description:")
        self.value(function.get("description") or "")
        if function.get("parameters"):
            self._say(",parameters:")
            self.schema(function["parameters"])
        self._say("}")
        self._mark("<tool|>")

    def call(self, call: Any) -> None:
        """A tool call, as `{"id": ..., "function": {"name": ..., "arguments": {...}}}`."""
        function = _mapping(_mapping(call, "a tool call").get("function"), "a tool call's `function`")
        self._mark("<|tool_call>")
        self._say(f"call:{_name(function)}{{")
        self.fields(_arguments(function.get("arguments")))
        self._say("}")
        self._mark("<tool_call|>")


def _arguments(arguments: Any) -> Mapping[str, Any]:
    """Arguments as a mapping; the JSON text of one, as OpenAI's API writes it, is read."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(
                "a tool call's arguments are no JSON object", remedy='write {"name": value, ...}.'
            ) from error
    return _mapping(arguments or {}, "a tool call's `arguments`")


def _name(function: Mapping[str, Any]) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise UserError("a tool has no name", remedy='give it a text under "name".')
    return name


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} is no object but {type(value).__name__}", remedy="write it as {...}.")
    return value


def _sorted(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """As Jinja's dictsort, which the published templates use: by key, regardless of case."""
    return sorted(((str(key), value) for key, value in mapping.items()), key=lambda item: item[0].lower())
