"""Gemma 4's chat template: conversations to text, to token ids, and to the mask of what is trained.

    >>> render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
    '<bos><|turn>user\\nHi<turn|>\\n<|turn>model\\nHello!<turn|>\\n'

and with the published vocabulary, `encode` gives (x: a training target)

    2      105     2364  107  10979  106      107  105     4368   107  9259   236888  106      107
    <bos>  <|turn> user  \\n   Hi     <turn|>  \\n   <|turn> model  \\n   Hello  !       <turn|>  \\n
    .      .       .     .    .      .        .    .       .      .    x      x       x        .

Trained is what the model has to say itself: the content of its turns, thoughts and tool calls among it, and
the token with which it stops: the closing `<turn|>`, or the `<|tool_response>` after its calls, with which it
hands over to the tools. What the tools answer, headers, the line break after `<turn|>`, the generation prompt
and everything of other roles is not trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from keras_gemma_ft.data.encoding import ScriptEncoder
from keras_gemma_ft.data.layout import Layout
from keras_gemma_ft.data.script import Script
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.errors import UserError

Variant = Literal["edge", "large"]
Thinking = Literal["off", "last_turn", "keep"]
TrainOn = Literal["all", "last"]


class Encoded(NamedTuple):
    """One conversation in tokens.

    Attributes:
        token_ids: int32 [n], starting with the one `<bos>`.
        loss_mask: bool [n]; True where the token is a training target.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Template:
    """How conversations are laid out and which turns are trained.

    Attributes:
        variant: `edge` for E2B and E4B, `large` for 26B-A4B and 31B. They differ in the generation prompt:
            with thinking off, the large models get an empty thought.
        enable_thinking: Whether the system turn carries `<|think|>`. None is the published default, off.
        thinking: Which `reasoning` (or `reasoning_content`) of model messages is shown: `last_turn` that
            after the last user message, as published; `keep` all of it; `off` none. Thoughts spelled inside
            the content (`<|channel>…<channel|>`) are always left out, as published.
        train_on: `all` model turns, or the `last` one.
    """

    variant: Variant = "edge"
    enable_thinking: bool | None = None
    thinking: Thinking = "last_turn"
    train_on: TrainOn = "all"

    def __post_init__(self) -> None:
        for field, choices in (("variant", Variant), ("thinking", Thinking), ("train_on", TrainOn)):
            if getattr(self, field) not in get_args(choices):
                raise UserError(
                    f"{field} is {getattr(self, field)!r}",
                    remedy=f"choose one of {', '.join(get_args(choices))}.",
                )

    def script(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Script:
        """Lays a conversation out.

        Raises:
            UserError: A message cannot be rendered; `where` says which, counting from 1.
        """
        return Layout(self, messages, tools).write(add_generation_prompt)

    @property
    def sha256(self) -> str:
        """A hash of what the template does: of the scripts of conversations that take all its branches."""
        scripts = [self.script(**probe) for probe in _PROBES]
        layouts = [list(zip(script.texts, script.flags, strict=True)) for script in scripts]
        return hashlib.sha256(json.dumps(layouts).encode()).hexdigest()


def render(
    messages: Sequence[Mapping[str, Any]],
    variant: Variant = "edge",
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: Thinking = "last_turn",
) -> str:
    """The conversation as text, `<bos>` included: to the letter that of the published templates.

    Args:
        messages: Dicts with `role` (system, developer, user, assistant, model or tool) and `content` (text,
            or a list of `{"type": "text", "text": ...}`); optionally `reasoning` or `reasoning_content`,
            `tool_calls`, and for tool messages `name` and `tool_call_id`.
        variant: See `Template`; so are `enable_thinking` and `thinking`.
        add_generation_prompt: Whether to open a model turn at the end.
        tools: Declarations as `{"type": "function", "function": {"name": ..., "parameters": ...}}`.

    Raises:
        UserError: A message cannot be rendered.
    """
    template = Template(variant, enable_thinking, thinking)
    return str(template.script(messages, tools, add_generation_prompt))


def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    variant: Variant = "edge",
    enable_thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: Thinking = "last_turn",
    train_on: TrainOn = "all",
) -> Encoded:
    """Token ids and loss mask of a conversation; for many of them, `ScriptEncoder` is faster.

    The ids are those of the rendered text, except where the data spells a control token: that becomes
    ordinary text (see `ScriptEncoder`; `Template.script(...).spelled(tokenizer)` lists them).

    Raises:
        UserError: A message cannot be rendered.
    """
    template = Template(variant, enable_thinking, thinking, train_on)
    batch = ScriptEncoder(tokenizer).encode([template.script(messages, tools)])
    return Encoded(batch.token_ids, batch.loss_mask)


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    variant: Variant = "edge",
    enable_thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: Thinking = "last_turn",
) -> np.ndarray:
    """Token ids of a conversation that ends in the generation prompt, int32 [n].

    Raises:
        UserError: A message cannot be rendered.
    """
    template = Template(variant, enable_thinking, thinking)
    script = template.script(messages, tools, add_generation_prompt=True)
    return ScriptEncoder(tokenizer).encode([script]).token_ids


_WEATHER = {
    "name": "weather",
    "description": "Of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Name", "enum": ["Oslo", "Rome"]},
            "Days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
        },
        "required": ["city"],
    },
}
_CALL = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo", "x": [1.5, None, True]}}}
_PROBES: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "developer", "content": " Be brief. "},
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "<|channel>x<channel|>one", "reasoning": "r1"},
            {"role": "model", "content": "two"},
            {"role": "user", "content": None},
            {"role": "assistant", "content": "three", "reasoning_content": "r2"},
        ],
        "add_generation_prompt": True,
    },
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Look.", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "snow"},
            {"role": "tool", "name": "other", "content": "sun"},
            {"role": "assistant", "content": "Snow."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "tool_calls": [_CALL]},
        ],
        "tools": [{"type": "function", "function": _WEATHER}],
    },
]
