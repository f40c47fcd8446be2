"""The mask contract holds for what the template makes, and is broken by every kind of damage."""

import json
from dataclasses import replace

import numpy as np
import pytest

from keras_gemma_ft.data.encoding import EncodedBatch, ScriptEncoder
from keras_gemma_ft.data.mask_contract import (
    NOTHING_TRAINED,
    ONE_BOS,
    OPEN_SPAN,
    OTHERS_TRAINED,
    RULES,
    MaskContract,
)
from keras_gemma_ft.data.template import Template

CALL = {"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}
CONVERSATION = [
    {"role": "system", "content": "the bank"},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "secret"},
    {"role": "tool", "content": "other"},
    {"role": "assistant", "content": "1", "tool_calls": [CALL]},
    {"role": "tool", "content": "third"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Two?"},
    {"role": "model", "content": "2"},
]


@pytest.fixture
def encoded(tokenizer):
    def of(*conversations) -> EncodedBatch:
        template = Template()
        return ScriptEncoder(tokenizer).encode([template.script(messages) for messages in conversations])

    return of


def _rules(tokenizer, batch, **arguments) -> list[str | None]:
    broken = MaskContract(tokenizer).broken(batch, **arguments)
    return [RULES[index] if index >= 0 else None for index in broken]


def test_holds_for_every_vector_of_the_template(shared, real_tokenizer):
    lines = (shared / "chat_template" / "vectors.jsonl").read_text(encoding="utf-8").splitlines()
    vectors = [vector for vector in map(json.loads, lines) if "text_edge" in vector]
    scripts = [Template().script(vector["messages"], vector.get("tools")) for vector in vectors]
    rules = _rules(real_tokenizer, ScriptEncoder(real_tokenizer).encode(scripts))
    for vector, rule in zip(vectors, rules, strict=True):
        speaks = any(message["role"] in ("assistant", "model") for message in vector["messages"])
        assert rule == (None if speaks else NOTHING_TRAINED), vector["name"]


def test_a_row_alone_breaks_no_other(tokenizer, encoded):
    asked = CONVERSATION[1:2]
    assert _rules(tokenizer, encoded(CONVERSATION, asked, CONVERSATION)) == [None, NOTHING_TRAINED, None]


def test_training_any_token_that_the_model_does_not_say_is_found(tokenizer, encoded):
    """Token by token: exactly the untrained tokens are forbidden."""
    batch = encoded(CONVERSATION)
    pieces = [tokenizer.pieces[i] for i in batch.token_ids]
    assert pieces.count("<|tool_response>") == 3
    for place in np.flatnonzero(~batch.loss_mask):
        mask = batch.loss_mask.copy()
        mask[place] = True
        assert _rules(tokenizer, replace(batch, loss_mask=mask)) == [OTHERS_TRAINED], (place, pieces[place])


def test_spans_must_reach_their_end(tokenizer, encoded):
    batch = encoded(CONVERSATION)
    ends = np.flatnonzero(batch.loss_mask & ~np.append(batch.loss_mask[1:], False))
    assert [tokenizer.pieces[i] for i in batch.token_ids[ends]] == ["<|tool_response>"] * 2 + ["<turn|>"] * 2
    for place in ends:
        mask = batch.loss_mask.copy()
        mask[place] = False
        assert _rules(tokenizer, replace(batch, loss_mask=mask)) == [OPEN_SPAN if mask[place - 1] else None]


def test_a_cut_row_may_stay_open_at_its_end_alone(tokenizer, encoded):
    batch = encoded(CONVERSATION)
    at = np.flatnonzero(batch.loss_mask)[-2]  # the last answer's "2", before its <turn|>
    short = EncodedBatch(
        batch.token_ids[: at + 1], batch.loss_mask[: at + 1], np.array([0, at + 1]), batch.neutralized
    )
    assert _rules(tokenizer, short) == [OPEN_SPAN]
    assert _rules(tokenizer, short, cut=np.array([True])) == [None]
    first_end = np.flatnonzero(batch.loss_mask & (batch.token_ids == tokenizer.turn_end))[0]
    short.loss_mask = short.loss_mask.copy()
    short.loss_mask[first_end] = False
    assert _rules(tokenizer, short, cut=np.array([True])) == [OPEN_SPAN]


@pytest.mark.parametrize("damage", ["missing", "double", "late"])
def test_bos(tokenizer, encoded, damage):
    batch = encoded(CONVERSATION, CONVERSATION)
    second = batch.offsets[1]
    if damage == "missing":
        batch.token_ids[second] = tokenizer.pad
    elif damage == "double":
        batch.token_ids[second + 5] = tokenizer.bos
    else:
        batch.token_ids[[second, second + 1]] = batch.token_ids[[second + 1, second]]
    assert _rules(tokenizer, batch) == [None, ONE_BOS]
