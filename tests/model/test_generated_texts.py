"""Texts in, texts out, on the embedded preset."""

import pytest

from keras_gemma_ft import GemmaCausalLM
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.template import Template, encode_prompt
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.generation import generate_tokens, stream

QUESTION = "Where can I get a library card?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def tiny() -> GemmaCausalLM:
    return GemmaCausalLM.from_preset("gemma4_tiny", dtype="float32")


def test_a_prompt_may_be_a_text_messages_or_a_conversation(tiny):
    answers = tiny.generate([QUESTION, MESSAGES, Conversation(MESSAGES, "here")], 24, batch_size=1)
    assert answers[0]
    assert answers == answers[:1] * 3
    assert tiny.generate(QUESTION, 24) == answers[0]
    assert tiny.generate(MESSAGES, 24) == answers[0]
    assert tiny.generate([], 24) == []


def test_an_answer_in_pieces_is_the_same_answer(tiny):
    pieces = list(stream(tiny, QUESTION, 24))
    assert len(pieces) > 2
    assert "".join(pieces) == tiny.generate(QUESTION, 24)
    sampled = {"temperature": 1.0, "top_k": 20, "seed": 5}
    assert "".join(stream(tiny, QUESTION, 24, **sampled)) == tiny.generate(QUESTION, 24, **sampled)


def test_the_token_that_stops_is_no_part_of_the_answer(tiny):
    prompt = encode_prompt(MESSAGES, tiny.tokenizer, tiny.config.variant)
    stops = tiny.tokenizer.stop_ids
    (tokens,) = generate_tokens(
        tiny.params(), tiny.config, [prompt], 24, settings=tiny.settings, stop_ids=stops
    )
    assert tokens[-1] in stops
    assert tiny.generate(QUESTION, 24) == tiny.tokenizer.decode(tokens[:-1])
    # Without stop tokens it goes on, and the first ones are the same.
    assert tiny.generate(QUESTION, 24, stop_ids=()).startswith(tiny.tokenizer.decode(tokens[:-1]))


def test_tools_and_template_reach_the_prompt(tiny, monkeypatch):
    from keras_gemma_ft.model import generation

    seen = []
    monkeypatch.setattr(
        generation, "generate_tokens", lambda params, config, prompts, *_, **__: seen.extend(prompts) or [[5]]
    )
    tool = {"type": "function", "function": {"name": "opening_hours", "description": "Of an office"}}
    tiny.generate(Conversation(MESSAGES, "here", tools=[tool]))
    tiny.generate(MESSAGES, template=Template("edge", enable_thinking=True))
    decoded = [tiny.tokenizer.decode(prompt) for prompt in seen]
    assert "opening_hours" in decoded[0]
    assert "<|think|>" in decoded[1]


def test_a_model_without_vocabulary_says_so(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "tokenizer", None)
    with pytest.raises(UserError, match="no vocabulary"):
        tiny.generate(QUESTION)
