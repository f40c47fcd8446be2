"""The data chapter: prepared once, used again on resume, told apart when something changed."""

import pytest

from keras_gemma_ft.config import default_config
from keras_gemma_ft.data import from_config
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.train import examples


def conversation(number):
    return Conversation(
        [
            {"role": "user", "content": f"What is {number} + 1?"},
            {"role": "assistant", "content": str(number + 1)},
        ],
        f"train.jsonl:{number + 1}",
    )


@pytest.fixture
def config(shared, tmp_path, monkeypatch):
    made = default_config()
    made.data.train = str(tmp_path / "train.jsonl")
    made.data.max_length = 64
    (tmp_path / "train.jsonl").write_text("as it was")
    rows = [conversation(number) for number in range(50)]
    monkeypatch.setattr(examples, "conversations", lambda config, tell: (rows[:45], rows[45:]))
    monkeypatch.setattr(from_config, "variant_of", lambda preset: "edge")
    vocabulary = Tokenizer.from_file(shared / "tokenizer" / "gemma4.model")
    monkeypatch.setattr(Tokenizer, "from_preset", lambda preset: vocabulary)
    return made


def test_rows_are_prepared_once_and_opened_again(config, tmp_path):
    told = []
    first = examples.prepare_examples(config, tmp_path / "data", told.append)
    assert (first.train_examples, first.held_out_examples) == (45, 5)
    assert len(first.train) < 45  # packed
    assert first.train.length == 64
    assert told == []
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.npy")}
    again = examples.prepare_examples(config, tmp_path / "data", told.append)
    assert again.facts == first.facts
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.npy")} == written


def test_other_rows_are_other_facts(config, tmp_path):
    first = examples.prepare_examples(config, tmp_path / "a", print)
    config.data.packing = False
    second = examples.prepare_examples(config, tmp_path / "b", print)
    assert first.facts["sha256"] != second.facts["sha256"]
    assert len(second.train) == 45
    with pytest.raises(UserError, match="packing"):
        examples.prepare_examples(config, tmp_path / "a", print)
    (tmp_path / "train.jsonl").write_text("changed")
    with pytest.raises(UserError, match="sources"):
        examples.prepare_examples(config, tmp_path / "b", print)


def test_what_became_of_rows_is_told(config, tmp_path, monkeypatch):
    rows = [conversation(number) for number in range(9)]
    rows[3].messages[1]["content"] = "very long " * 100
    monkeypatch.setattr(examples, "conversations", lambda config, tell: (rows[:8], rows[8:]))
    told = []
    made = examples.prepare_examples(config, tmp_path / "data", told.append)
    assert made.train_examples == 7
    assert told == ["train data: 1 of 8 conversations were left out: longer than 64 tokens."]
