"""The corpus is the same whoever makes it, holds no text that is kept out, and fits the model's rows."""

import json
import random

import numpy as np
import pytest

from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.presets import resolve_preset
from pretrain import requests
from pretrain.corpus import FAMILIES, PHRASES, document, documents
from pretrain.demo_data import HELD_OUT, TRAIN, examples
from pretrain.exclusion import Exclusion, read_prompts, words_of
from pretrain.grammar import Writer, undefined
from pretrain.tokens import encode_documents, pack


def test_templates_expand_and_bind():
    writer = Writer(random.Random(0), {"fruit": ["[red|green] apple", "pear"]})
    seen = {writer.write("a {fruit}[, please|]") for _ in range(200)}
    assert seen == {f"a {f}{p}" for f in ("red apple", "green apple", "pear") for p in ("", ", please")}
    for _ in range(50):
        writer.bound.clear()
        first, second = writer.write("{@fruit} / {@fruit}").split(" / ")
        assert first == second
    with pytest.raises(ValueError, match="not closed"):
        writer.write("a [b|c")
    with pytest.raises(ValueError, match="brace"):
        writer.write("a {fruit")


def test_every_phrase_is_defined():
    lines = [
        line for intent in requests.INTENTS for case in intent.cases for line in (case.answer, *case.messages)
    ]
    assert not undefined(PHRASES, lines)
    assert undefined(PHRASES, ["{nothing}"]) == {"nothing"}


def test_a_document_depends_on_its_number_alone():
    assert [document(number) for number in range(40, 60)] == list(documents(40, 60))
    assert document(7) != document(8)


@pytest.mark.parametrize("maker", [maker for maker, _ in FAMILIES], ids=lambda maker: maker.__name__)
def test_every_family_gives_documents(maker):
    for seed in range(30):
        made = maker(Writer(random.Random(seed), PHRASES))
        parts = [made] if isinstance(made, str) else [message["content"] for message in made]
        assert all(part.strip() and "{" not in part.replace('{"', "") for part in parts)
        if not isinstance(made, str):
            assert made[-1]["role"] == "model"


def test_excluded_texts_stay_out():
    made = [document for document in documents(0, 3000) if isinstance(document, list)]
    victims = [talk[-2]["content"] for talk in made[::50]]
    excluded = Exclusion(victims)
    assert 0 < len(excluded) <= len(victims)
    left = list(documents(0, 3000, excluded))
    assert 3000 - len(left) > 0
    assert not any(excluded.hits(m["content"]) for d in left if isinstance(d, list) for m in d)
    assert Exclusion(["Where IS my card?"]).hits("hi, where is my card. thanks")
    assert not Exclusion(["Where IS my card?"]).hits("where is my new card")
    assert not Exclusion(["thank you"]).hits("thank you")


def test_prompts_are_read_from_both_kinds_of_files(tmp_path):
    (tmp_path / "a.csv").write_text('text,category\n"one, two three",x\n')
    rows = [{"role": "user", "content": "four five six"}, {"role": "model", "content": "seven"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": rows}) + "\n")
    assert list(read_prompts([tmp_path / "a.csv", tmp_path / "b.jsonl"])) == [
        "one, two three",
        "four five six",
    ]


def test_the_labels_of_banking77_are_none_of_ours(shared):
    theirs = set(json.loads((shared / "datasets/banking77/categories.json").read_text()))
    ours = {intent.label.replace(" ", "_") for intent in requests.INTENTS}
    assert len(theirs) == 77
    assert not ours & theirs


def test_rows_hold_whole_documents():
    tokenizer = Tokenizer.from_file(resolve_preset("gemma4_tiny") / "tokenizer.model")
    made = list(documents(0, 200))
    encoded = encode_documents(made, tokenizer)
    assert len(encoded) == len(made)
    rows = pack(encoded, 256, tokenizer.pad)
    fitting = [ids for ids in encoded if len(ids) <= 256]
    assert rows.dtype == np.uint16
    assert np.count_nonzero(rows == tokenizer.bos) == len(fitting) > 190
    assert np.count_nonzero(rows != tokenizer.pad) == sum(map(len, fitting))
    assert all(row[0] == tokenizer.bos for row in rows)


def test_the_demo_shipped_is_the_demo_made():
    from keras_gemma_ft.presets import DEMO

    shipped = []
    for name in ("train", "held_out"):
        rows = map(json.loads, (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        shipped.append([(row["prompt"], row["response"]) for row in rows])
    assert tuple(shipped) == examples()
    assert list(map(len, shipped)) == [TRAIN, HELD_OUT]
    train, held_out = ({words_of(text) for text, _ in part} for part in shipped)
    assert not train & held_out
    assert not {office for _, office in shipped[0]} & {intent.label for intent in requests.INTENTS}
