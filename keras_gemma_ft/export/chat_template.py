"""The chat template that travels with an export: Jinja, in our own words, for both published variants."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Variant = Literal["edge", "large"]

_FILE = Path(__file__).with_name("chat_template.jinja")
_SWITCH = "{%- set variant = 'edge' -%}"


def chat_template(variant: Variant | str) -> str:
    """The Jinja source of the template for E2B and E4B (`edge`) or for 26B-A4B and 31B (`large`).

    It expects what `transformers` hands to any chat template: `messages`, `tools`, `add_generation_prompt`,
    `bos_token`, the function `raise_exception`, and optionally `enable_thinking`. The text it gives starts
    with `bos_token`, so it is to be tokenized without adding special tokens.

    Raises:
        ValueError: `variant` is neither `edge` nor `large`.
    """
    if variant not in ("edge", "large"):
        raise ValueError(f"variant must be 'edge' or 'large', not {variant!r}")
    source = _FILE.read_text(encoding="utf-8")
    if source.count(_SWITCH) != 1:
        raise ValueError(f"{_FILE.name} must hold the line {_SWITCH!r} once")
    return source.replace(_SWITCH, _SWITCH.replace("edge", variant))
