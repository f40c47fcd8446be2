"""Whatever a row holds: an error that says where, or tokens that keep the mask contract and the text."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_gemma_ft.data.encoding import ScriptEncoder
from keras_gemma_ft.data.mask_contract import NOTHING_TRAINED, RULES, MaskContract
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.shards import Recipe, ShardMaker
from keras_gemma_ft.data.template import Template, render
from keras_gemma_ft.data.truncation import POLICIES
from keras_gemma_ft.errors import UserError

SPELLED = [
    "<|turn>model\n",
    "<turn|>\n",
    "<bos>",
    "<eos>",
    "<|tool_response>",
    "<tool_response|>",
    "<channel|>",
]
SPELLED += [
    "<|channel>",
    '<|"|>',
    "<|tool_call>",
    "<tool_call|>",
    "<",
    "|turn>",
    "<|turn",
    "turn|>",
    "\n",
    "  ",
]
SPELLED += ["model\n", "\0", "▁", "> </"]
SOUND_TEXTS = st.lists(st.one_of(st.sampled_from(SPELLED), st.text(max_size=8)), max_size=6).map("".join)
TEXTS = st.one_of(SOUND_TEXTS, SOUND_TEXTS, SOUND_TEXTS.map(lambda text: text + "\ud83d"))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
CALLS = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["1", "2", None]),
        "function": st.fixed_dictionaries({"name": TEXTS, "arguments": JSON}),
    }
)
CONTENT = st.one_of(TEXTS, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})), JSON)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "model", "tool"]), "content": CONTENT},
    optional={
        "reasoning": TEXTS,
        "tool_calls": st.lists(CALLS, max_size=2),
        "tool_call_id": st.sampled_from(["1", "2"]),
        "name": JSON,
    },
)
MESSAGES = st.lists(st.one_of(MESSAGE, MESSAGE, MESSAGE, JSON), max_size=6)
# Rows that are right, so that the fuzzing gets past the first check: turns in any order, some with tools.
SOUND_CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": st.just("f"), "arguments": st.just({"x": 1})})}
    ),
    min_size=1,
    max_size=2,
)
SOUND_TURN = st.one_of(
    st.tuples(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": SOUND_TEXTS})),
    st.tuples(
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": SOUND_TEXTS, "reasoning": SOUND_TEXTS}
        )
    ),
    st.tuples(
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": SOUND_TEXTS, "tool_calls": SOUND_CALLS}
        ),
        st.fixed_dictionaries({"role": st.just("tool"), "content": SOUND_TEXTS}),
    ),
)
SOUND = st.lists(SOUND_TURN, min_size=1, max_size=6).map(lambda turns: [m for turn in turns for m in turn])
TOOLS = st.one_of(st.none(), JSON, st.lists(st.fixed_dictionaries({"function": JSON}), max_size=2))
TEMPLATES = st.builds(
    Template,
    variant=st.sampled_from(["edge", "large"]),
    enable_thinking=st.sampled_from([None, True, False]),
    thinking=st.sampled_from(["off", "last_turn", "keep"]),
    train_on=st.sampled_from(["all", "last"]),
)
RELAXED = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["tokenizer", "json_tokenizer"])
def vocabulary(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def jinja():
    import jinja2

    from keras_gemma_ft.export.chat_template import chat_template

    return {name: jinja2.Environment().from_string(chat_template(name)) for name in ("edge", "large")}


@given(messages=st.one_of(MESSAGES, SOUND, JSON), tools=TOOLS, template=TEMPLATES, prompt=st.booleans())
@RELAXED
def test_every_conversation(vocabulary, messages: Any, tools: Any, template: Template, prompt: bool):
    try:
        script = template.script(messages, tools, add_generation_prompt=prompt)
    except UserError as error:
        assert error.what
        assert error.remedy
        return
    batch = ScriptEncoder(vocabulary).encode([script])
    # The text survives to the letter, whatever control tokens it spells (▁ is a space to it) ...
    assert vocabulary.decode(batch.token_ids) == str(script).removeprefix("<bos>").replace("▁", " ")
    # ... and none of them becomes one: all control tokens are the template's.
    of_template = "".join(t for t, flag in zip(script.texts, script.flags, strict=True) if flag & 2)
    control = [vocabulary.pieces[i] for i in batch.token_ids if i in vocabulary.control.values()]
    assert control == vocabulary.control_spelling.findall(of_template)
    rule = MaskContract(vocabulary).broken(batch)[0]
    assert rule == -1 or RULES[rule] == NOTHING_TRAINED


@given(
    messages=SOUND, thinking=st.booleans(), prompt=st.booleans(), variant=st.sampled_from(["edge", "large"])
)
@RELAXED
def test_the_exported_jinja_template_gives_the_same_text(jinja, messages, thinking, prompt, variant):
    arguments = {"messages": messages, "enable_thinking": thinking, "add_generation_prompt": prompt}
    assert render(variant=variant, **arguments) == jinja[variant].render(bos_token="<bos>", **arguments)


@given(
    rows=st.lists(st.one_of(SOUND, SOUND, MESSAGES), max_size=12),
    template=TEMPLATES,
    truncation=st.sampled_from(POLICIES),
    packing=st.booleans(),
    max_length=st.integers(16, 120),
)
@RELAXED
def test_every_file(tokenizer, rows, template, truncation, packing, max_length):
    """Through truncation and packing: every segment in the rows is a sound conversation."""
    recipe = Recipe(template, max_length, packing, truncation)
    conversations = [Conversation(messages, f"train.jsonl:{n}") for n, messages in enumerate(rows, 1)]
    packed, counts, problems = ShardMaker(tokenizer, recipe).rows(conversations)
    assert counts["conversations"] == len(rows)
    assert counts["examples"] >= len(rows) - len(problems) - counts["dropped"]
    assert all(problem.where.startswith("train.jsonl:") for problem in problems)
    segments = examples = trained = 0
    for ids, segment_ids, mask in zip(packed.token_ids, packed.segment_ids, packed.loss_mask, strict=True):
        filled = int((segment_ids > 0).sum())
        assert not segment_ids[filled:].any()
        assert not mask[filled:].any()
        starts = np.flatnonzero(np.diff(segment_ids[:filled], prepend=0))
        np.testing.assert_array_equal(segment_ids[starts], np.arange(1, len(starts) + 1))
        np.testing.assert_array_equal(np.flatnonzero(ids[:filled] == tokenizer.bos), starts)
        assert not mask[starts].any()
        segments += len(starts)
        trained += int(mask.sum())
    examples = counts["examples"]
    assert segments == examples
    assert trained == counts["trained_tokens"] >= examples


def test_the_strategies_reach_sound_rows():
    """Fuzzing that only ever sees the first check finds nothing."""
    sound = spelled = tools = 0

    @given(messages=st.one_of(MESSAGES, SOUND))
    @settings(RELAXED, database=None, derandomize=True)
    def count(messages):
        nonlocal sound, spelled, tools
        try:
            text = str(Template().script(messages))
        except UserError:
            return
        sound += "<|turn>model" in text
        spelled += any(f'"{piece}' in json.dumps(messages) for piece in ("<|turn>", "<turn|>"))
        tools += "response:" in text

    count()
    assert sound > 60
    assert spelled > 10
    assert tools > 20
