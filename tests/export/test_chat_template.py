"""The exported Jinja template, against the text that the published templates give."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from keras_gemma_ft.export.chat_template import chat_template

ARGUMENTS = ("messages", "add_generation_prompt", "enable_thinking", "tools", "preserve_thinking")
VARIANTS = ("edge", "large")
USER = {"role": "user", "content": "Hi"}


def _render(variant: str, **arguments: Any) -> str:
    """Renders with nothing but jinja2: no blocks trimmed, no extensions."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment()
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(chat_template(variant)).render(bos_token="<bos>", **arguments)


@pytest.fixture(scope="module")
def vectors(shared: Path) -> list[dict[str, Any]]:
    lines = (shared / "chat_template" / "vectors.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _arguments(vector: dict[str, Any]) -> dict[str, Any]:
    return {name: vector[name] for name in ARGUMENTS if name in vector}


@pytest.mark.parametrize("variant", VARIANTS)
def test_renders_every_vector_with_plain_jinja(vectors, variant):
    assert len(vectors) == 99
    for vector in vectors:
        expected = vector.get(f"text_{variant}")
        if expected is None:  # the published templates fail on this one, for want of text
            with pytest.raises(jinja2.TemplateError, match="must be text"):
                _render(variant, **_arguments(vector))
        else:
            assert _render(variant, **_arguments(vector)) == expected, vector["name"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_renders_every_vector_through_transformers(vectors, variant):
    from transformers.utils.chat_template_utils import render_jinja_template

    for vector in vectors:
        if f"text_{variant}" not in vector:
            continue
        arguments = _arguments(vector)
        rendered, _ = render_jinja_template(
            [arguments.pop("messages")],
            chat_template=chat_template(variant),
            bos_token="<bos>",
            **arguments,
        )
        assert rendered == [vector[f"text_{variant}"]], vector["name"]


def test_variants_differ_in_the_generation_prompt_alone():
    messages = [USER, {"role": "assistant", "content": "Hello!"}, USER]
    assert _render("edge", messages=messages) == _render("large", messages=messages)
    edge, large = (_render(v, messages=messages, add_generation_prompt=True) for v in VARIANTS)
    assert large == edge + "<|channel>thought\n<channel|>"


def test_text_that_came_with_a_call_survives_without_an_answer():
    call = {"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}
    asked = {"role": "assistant", "content": "Let me look.", "tool_calls": [call]}
    text = _render("edge", messages=[USER, asked])
    assert text.endswith("<|turn>model\n<|tool_call>call:f{x:1}<tool_call|>Let me look.<|tool_response>")
    answer = {"role": "tool", "tool_call_id": "1", "content": "2"}
    text = _render("edge", messages=[USER, asked, answer], add_generation_prompt=True)
    assert text.endswith('<|tool_response>response:f{value:<|"|>2<|"|>}<tool_response|>Let me look.')


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([USER, {"role": "tool", "content": "2"}], "must follow the tool call"),
        ([{"role": "critic", "content": "no"}], "not critic"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part of type image"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            "must be an object",
        ),
    ],
)
def test_what_cannot_be_said_is_an_error(messages, complaint):
    with pytest.raises(jinja2.TemplateError, match=complaint):
        _render("edge", messages=messages)


def test_unknown_variant():
    with pytest.raises(ValueError, match="'medium'"):
        chat_template("medium")
