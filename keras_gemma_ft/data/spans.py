"""Named stretches of a text (slots, entities) as the answer that names them: a JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from keras_gemma_ft.errors import UserError

_NAME = ("slot", "label", "type", "name", "entity")
_START = ("start", "startIndex", "start_offset", "begin")
_END = ("end", "endIndex", "end_offset", "stop")


def answer_of_spans(text: str, spans: Any) -> str:
    """What the spans say of a text.

        >>> answer_of_spans("for 5 at 8", [{"slot": "people", "start": 4, "end": 5}, [9, 10, "time"]])
        '{"people": "5", "time": "8"}'

    Args:
        text: What the spans are of.
        spans: A list of objects with a name, a start and an end, which may lie in an object of their own
            (`{"slot": …, "valueSpan": {"startIndex": …, "endIndex": …}}`), or of `[start, end, name]`. They
            count characters, the end not included. A start that is left out is 0: Protocol Buffers do so.

    Returns:
        A JSON object in the order of the text; a name that occurs twice has a list.

    Raises:
        UserError: A span has no name or no end, or lies outside of the text.
    """
    if not isinstance(spans, list):
        raise UserError("the spans are no list", remedy='write [{"label": …, "start": …, "end": …}, …].')
    found: dict[str, list[str]] = {}
    for start, end, name in sorted(_span(span, number, len(text)) for number, span in enumerate(spans, 1)):
        found.setdefault(name, []).append(text[start:end])
    return json.dumps(
        {name: values[0] if len(values) == 1 else values for name, values in found.items()},
        ensure_ascii=False,
    )


def _span(span: Any, number: int, length: int) -> tuple[int, int, str]:
    start: Any
    if isinstance(span, list) and len(span) == 3:
        start, end, name = span
    elif isinstance(span, Mapping):
        fields = dict(span)
        for value in span.values():
            if isinstance(value, Mapping):
                fields |= value
        end, name = _first(fields, _END), _first(fields, _NAME)
        start = _first(fields, _START)
        start = 0 if start is None else start
    else:
        start = end = name = None
    if not isinstance(name, str) or not isinstance(start, int) or not isinstance(end, int):
        raise UserError(
            "it lacks a name, a start or an end",
            where=f"span {number}",
            remedy='write {"label": "time", "start": 9, "end": 10}.',
        )
    if not 0 <= start < end <= length:
        raise UserError(
            f"it reaches from {start} to {end}, the text from 0 to {length}",
            where=f"span {number}",
            remedy="count in characters, the end not included.",
        )
    return start, end, name


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if name in fields), None)
