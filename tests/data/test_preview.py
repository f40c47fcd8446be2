"""The preview marks exactly the tokens that the loss of a prepared dataset counts."""

import random
from collections import Counter

import numpy as np
import pytest

from keras_gemma_ft.data import Conversation, Recipe, Template, prepare
from keras_gemma_ft.data.preview import Previewer

CALL = {"function": {"name": "find", "arguments": {"card": "lost"}}}


def _conversations(random_text) -> list[Conversation]:
    rng = random.Random(0)
    found = []
    for n in range(60):
        messages = [{"role": "system", "content": random_text(rng)}] if n % 3 == 0 else []
        for turn in range(rng.randint(1, 4)):
            messages.append({"role": "user", "content": random_text(rng) or "the"})
            if turn % 2:
                messages.append({"role": "model", "tool_calls": [CALL]})
                messages.append({"role": "tool", "content": random_text(rng)})
            messages.append({"role": "assistant", "content": random_text(rng) + f" {n}"})
        found.append(Conversation(messages, f"a:{n + 1}"))
    return found


def _examples(dataset) -> Counter:
    """Every segment of the packed rows on disk: its token ids and its loss mask."""
    rows = dataset.rows(range(len(dataset)))
    found: Counter = Counter()
    for ids, segments, mask in zip(rows["token_ids"], rows["segment_ids"], rows["loss_mask"], strict=True):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            found[tuple((int(ids[i]), bool(mask[i])) for i in at)] += 1
    return found


@pytest.mark.parametrize("policy", ["drop", "truncate_left", "truncate_right", "split_turns"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_previews_are_the_prepared_rows_token_for_token(tmp_path, tokenizer, random_text, policy, train_on):
    recipe = Recipe(Template(train_on=train_on), max_length=256, truncation=policy)
    conversations = _conversations(random_text)
    dataset = prepare(conversations, tmp_path / "data", tokenizer, recipe, {}, on_error="skip", workers=1)
    previewer = Previewer(tokenizer, recipe)
    previews = [preview for conversation in conversations for preview in previewer.of(conversation)]
    shown = Counter(tuple((token.id, token.trained) for token in preview.tokens) for preview in previews)
    assert shown == _examples(dataset)
    counts = dataset.manifest["counts"]
    assert 10 < len(previews) == counts["examples"]
    assert sum(preview.trained for preview in previews) == counts["trained_tokens"]


def test_tokens_are_shown_by_their_text(tokenizer):
    messages = [
        {"role": "user", "content": "the bank\n你 <|turn>"},
        {"role": "model", "content": "lost card"},
    ]
    (preview,) = Previewer(tokenizer, Recipe()).of(Conversation(messages, "a:7"))
    assert preview.origin == "a:7"
    text = "".join(token.text for token in preview.tokens)
    turns = text.split("\n<|turn>model\n")
    assert turns[0] == "<bos><|turn>user\nthe bank\n<0xE4><0xBD><0xA0> <0x3C><0x7C>turn<0x3E><turn|>"
    assert turns[1] == "lost card<turn|>\n"
    control = [token.text for token in preview.tokens if token.control]
    assert control == ["<bos>", "<|turn>", "<turn|>", "<|turn>", "<turn|>"]
    assert "".join(token.text for token in preview.tokens if token.trained) == "lost card<turn|>"


def test_a_row_that_is_left_out_has_no_preview(tokenizer):
    messages = [{"role": "user", "content": "the bank"}, {"role": "model", "content": "card " * 50}]
    assert Previewer(tokenizer, Recipe(max_length=32)).of(Conversation(messages, "a:1")) == []
