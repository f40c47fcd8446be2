"""How an answer is read: normalized text, tokens in common, slots of a JSON object, the final number.

Exact match and token F1 follow the definitions of SQuAD (Rajpurkar et al. 2016, the official evaluation
script): lower case, no punctuation, no articles, single spaces; F1 over the multiset of tokens in common.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Hashable, Iterable
from decimal import Decimal, InvalidOperation
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARKED_NUMBER = re.compile(r"####\s*\$?\s*([-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")


def normalize(text: str) -> str:
    """SQuAD's normalization: `"The  Eiffel Tower!"` → `"eiffel tower"`."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both are the same text after SQuAD's normalization."""
    return normalize(prediction) == normalize(reference)


def token_f1(prediction: str, reference: str) -> float:
    """SQuAD's F1 over normalized tokens in common; two empty texts agree."""
    return bag_f1(normalize(prediction).split(), normalize(reference).split())


def bag_f1(predicted: Iterable[Hashable], expected: Iterable[Hashable]) -> float:
    """F1 over the multiset intersection; 1 where both are empty, 0 where one is."""
    ours, theirs = Counter(predicted), Counter(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total())


def parse_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in an answer, bare, in a code fence or after some words; None without one."""
    decoder = json.JSONDecoder()
    for start in (index for index, character in enumerate(text) if character == "{"):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            continue
        return value
    return None


def slots(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Flattens a JSON value to `(slot, value)` pairs; null and empty values are no slots.

    Values are compared in lower case and with single spaces, but with their punctuation: 7:30 is not 730, and
    1.5 is not 15. `{"time": "7 PM", "guest": {"names": ["Ada", "Lin"]}}` →
    `[("time", "7 pm"), ("guest.names", "ada"), ("guest.names", "lin")]`.
    """
    if isinstance(value, dict):
        pairs = (slots(item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
        return [pair for group in pairs for pair in group]
    if isinstance(value, list):
        return [pair for item in value for pair in slots(item, name)]
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.lower().split())
    return [(name, text)] if text else []


def marked_number(text: str) -> Decimal | None:
    """The number after the last `####`, as GSM8K writes its answers; None without the marker."""
    found = _MARKED_NUMBER.findall(text)
    return to_number(found[-1]) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text, read with or without thousands separators; None where there is none."""
    found = _NUMBER.findall(text)
    return to_number(found[-1]) if found else None


def to_number(text: str) -> Decimal | None:
    """`"$1,234.50"` → `Decimal("1234.50")`; None for what is no number."""
    try:
        number = Decimal(text.replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
