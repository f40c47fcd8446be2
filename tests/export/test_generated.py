"""What an exported model says in transformers, token for token, is what it says here."""

import random
from pathlib import Path

import numpy as np
import pytest

from keras_gemma_ft import GemmaCausalLM
from keras_gemma_ft.data.template import encode_prompt
from keras_gemma_ft.json_files import read_lines
from keras_gemma_ft.model.generation import generate_tokens
from keras_gemma_ft.presets import DEMO

NEW = 16


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded preset with adapters that change what it says, merged."""
    model = GemmaCausalLM.from_preset("gemma4_tiny", dtype="float32")
    model.enable_lora(4)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(variable.value + rng.normal(0, 0.03, variable.shape))
    directory = tmp_path_factory.mktemp("exported") / "hf"
    model.export_to_transformers(directory)
    return directory


def conversations(count: int) -> list[list[dict[str, str]]]:
    """From one short question to a dozen turns: prompts within the window of 32 tokens, and far beyond it."""
    rows = list(read_lines(DEMO / "train.jsonl"))
    rng = random.Random(0)
    chosen = []
    for number in range(count):
        messages = []
        for row in rng.sample(rows, 1 + number % 6):
            messages += [{"role": "user", "content": row["prompt"]}]
            messages += [{"role": "assistant", "content": row["response"]}]
        chosen.append(messages[:-1])
    return chosen


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.heavy)])
def test_greedy_tokens_equal_those_of_transformers(exported, count):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = GemmaCausalLM.from_preset(str(exported), dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    stops = theirs.generation_config.eos_token_id
    assert sorted(stops) == sorted(ours.tokenizer.stop_ids)

    asked = conversations(count)
    prompts = [encode_prompt(messages, ours.tokenizer, ours.config.variant) for messages in asked]
    assert min(map(len, prompts)) < 32 < 64 < max(map(len, prompts))
    found = generate_tokens(
        ours.params(), ours.config, prompts, NEW, settings=ours.settings, stop_ids=ours.tokenizer.stop_ids
    )
    texts = ours.generate(asked, NEW)
    for messages, prompt, tokens, text in zip(asked, prompts, found, texts, strict=True):
        given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = given["input_ids"]
        assert ids[0].tolist() == prompt.tolist()
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            top_k=None,
            top_p=None,
        )
        assert tokens == out[0, len(prompt) :].tolist()
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert len({tuple(tokens) for tokens in found}) > count / 4, "too dull to tell anything"
    assert {tokens[-1] in stops for tokens in found} == {True, False}
