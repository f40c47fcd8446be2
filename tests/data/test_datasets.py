"""The recipes for published datasets, on those datasets: every row is read, and read right."""

import csv
import json
from collections import Counter

import pytest

from keras_gemma_ft.config import validate
from keras_gemma_ft.data.readers import conversations
from keras_gemma_ft.recipes import read_recipe


def both(shared, recipe, train, evaluate):
    config = read_recipe(f"data/{recipe}")
    config.data.train, config.data.eval = (
        str(shared / "datasets" / recipe / name) for name in (train, evaluate)
    )
    validate(config)
    return [list(part) for part in conversations(config)]


def said(row):
    return [message["content"] for message in row.messages]


def test_banking77(shared):
    train, held_out = both(shared, "banking77", "train.csv", "test.csv")
    assert (len(train), len(held_out)) == (10_003, 3_080)
    with (shared / "datasets/banking77/train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [said(row) for row in train] == [[f"Classify: {row['text']}", row["category"]] for row in rows]
    assert Counter(row.label for row in train) == Counter(row["category"] for row in rows)
    assert len({row.label for row in held_out}) == 77


def test_restaurant8k(shared):
    train, held_out = both(shared, "restaurant8k", "train_0.json", "test.json")
    assert (len(train), len(held_out)) == (8_198, 3_731)
    rows = json.loads((shared / "datasets/restaurant8k/train_0.json").read_text())
    for got, row in zip(train, rows, strict=True):
        question, answer = said(got)
        assert question.endswith(f"): {row['userInput']['text']}")
        spans = {label["slot"]: label["valueSpan"] for label in row.get("labels", [])}
        assert json.loads(answer) == {
            slot: row["userInput"]["text"][span.get("startIndex", 0) : span["endIndex"]]
            for slot, span in spans.items()
        }
    assert said(train[0]) == [
        "Slots (people): There will be 5 adults and 1 child.",
        '{"people": "5 adults and 1 child"}',
    ]


def test_gsm8k(shared):
    train, held_out = both(shared, "gsm8k", "train.jsonl", "test.jsonl")
    assert (len(train), len(held_out)) == (7_473, 1_319)
    rows = [json.loads(line) for line in (shared / "datasets/gsm8k/train.jsonl").read_text().splitlines()]
    assert [said(row) for row in train] == [[row["question"], row["answer"]] for row in rows]


@pytest.mark.parametrize(("recipe", "train"), [("banking77", "train.csv"), ("gsm8k", "train.jsonl")])
def test_what_is_held_out_of_them(shared, recipe, train):
    config = read_recipe(f"data/{recipe}")
    config.data.train = str(shared / "datasets" / recipe / train)
    config.data.eval_fraction = 0.2
    kept, held_out = (list(part) for part in conversations(config))
    assert len(held_out) == round(0.2 * (len(kept) + len(held_out)))
    assert not {said(row)[0].casefold() for row in kept} & {said(row)[0].casefold() for row in held_out}
    if recipe == "banking77":
        every, held = Counter(row.label for row in kept + held_out), Counter(row.label for row in held_out)
        assert all(abs(held[label] - 0.2 * count) <= 1 for label, count in every.items())
