"""Vocabularies: ids by piece, both file kinds, decoding token by token, encoding word by word."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.words import WordTable, ragged_arange
from keras_gemma_ft.errors import UserError


def test_special_ids_of_the_published_vocabulary(real_tokenizer):
    t = real_tokenizer
    assert (t.pad, t.eos, t.bos, t.turn_start, t.turn_end) == (0, 1, 2, 105, 106)
    assert t.stop_ids == (1, 106, 50)
    assert t.vocabulary_size == 262_144
    assert t.sha256 == "9f318ac4dc02f8580e3f65ff0b37286e7c3d1e5d664737bb2c8ca812b5453162"
    assert t.encode("<|turn>model\n") == [105, 4368, 107]
    assert t.id_of("<|channel>") == 100
    assert len(t.control) == 23  # 5 special, 12 of turns, tools and thoughts, 6 of images and audio


def test_special_ids_are_looked_up_by_piece(tokenizer):
    assert tokenizer.turn_start != 105
    assert tokenizer.pieces[tokenizer.turn_start] == "<|turn>"
    assert tokenizer.encode("<turn|>") == [tokenizer.turn_end]


def test_tokenizer_json_gives_the_ids_of_its_sentencepiece_model(tokenizer, json_tokenizer, random_text):
    rng = random.Random(0)
    texts = [random_text(rng).replace("<bos>", "") for _ in range(300)]
    assert json_tokenizer.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert json_tokenizer.stop_ids == tokenizer.stop_ids
    assert json_tokenizer.control == tokenizer.control
    ids = [i for text in texts for i in tokenizer.encode(text)] + [tokenizer.bos, tokenizer.eos]
    assert json_tokenizer.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["tokenizer", "json_tokenizer", "real_tokenizer"])
def test_words_together_are_the_text(kind, request, random_text):
    t: Tokenizer = request.getfixturevalue(kind)
    table = WordTable(t)
    rng = random.Random(1)
    cut = 0
    for _ in range(40):
        texts = [random_text(rng) for _ in range(25)]
        split = [table.split(text) for text in texts]
        cut += sum(len(words) > 1 for words in split)
        ids, lengths = table.encode([word for words in split for word in words])
        assert lengths.sum() == len(ids)
        assert ids.dtype == np.int32
        assert ids.tolist() == [i for text in texts for i in t.encode(text)]
    assert cut > 300  # the word path was taken, not only the whole-text path


def test_vocabularies_that_do_more_than_merge_are_not_cut(tmp_path, json_tokenizer):
    state = json.loads(json_tokenizer.serialized)

    def words(**changes: object) -> list[str]:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**state, **changes}), encoding="utf-8")
        return WordTable(Tokenizer.from_file(tmp_path / "tokenizer.json")).split("the bank")

    split = {"type": "Split", "behavior": "MergedWithPrevious", "invert": False}
    assert words() == ["the", " bank"]
    assert words(pre_tokenizer={**split, "pattern": {"String": " "}}) == ["the", " bank"]
    assert words(pre_tokenizer={**split, "pattern": {"Regex": "x"}}) == ["the bank"]
    assert words(normalizer={"type": "Lowercase"}) == ["the bank"]


def test_word_table_starts_over_when_full(tokenizer, monkeypatch):
    monkeypatch.setattr("keras_gemma_ft.data.words._MOST_WORDS", 10)
    table = WordTable(tokenizer)
    for n in range(30):
        words = [f"word{n}", "x" * 100, "the"]
        ids, _ = table.encode(words)
        assert ids.tolist() == tokenizer.encode("".join(words))
    assert len(table.lengths) < 40


def test_ragged_arange():
    assert ragged_arange(np.array([5, 9, 0]), np.array([3, 0, 2])).tolist() == [5, 6, 7, 0, 1]
    assert ragged_arange(np.array([], int), np.array([], int)).tolist() == []


def test_decode_equals_sentencepiece(real_tokenizer, random_text, shared):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(str(shared / "tokenizer" / "gemma4.model"))
    rng = random.Random(2)
    for _ in range(200):
        text = random_text(rng)
        ids = real_tokenizer.encode(text)
        assert real_tokenizer.decode(ids) == text.replace("▁", " ")
        assert real_tokenizer.decode(ids) == reference.decode(ids)


def test_stream_holds_back_incomplete_characters(tokenizer):
    stream = tokenizer.stream()
    byte = {b: tokenizer.id_of(f"<0x{b:02X}>") for b in range(256)}
    assert [stream.put(byte[b]) for b in "你".encode()] == ["", "", "你"]
    assert stream.put(byte[0xE4]) == ""
    assert stream.put(tokenizer.turn_end) == "�<turn|>"
    assert stream.put(byte[0xF0]) == ""
    assert stream.end() == "�"
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("Hi"), tokenizer.eos, tokenizer.pad]) == "Hi"


def test_pickles_by_path(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.sha256 == tokenizer.sha256
    assert again.encode("the bank") == tokenizer.encode("the bank")


@pytest.mark.parametrize("name", ["tokenizer.model", "assets/tokenizer/vocabulary.spm", "tokenizer.json"])
def test_presets_keep_their_vocabulary_in_several_places(
    tmp_path, monkeypatch, tokenizer, json_tokenizer, name
):
    monkeypatch.setattr("keras_gemma_ft.presets.resolve_preset", Path, raising=False)
    (tmp_path / "tokenizer.json").write_text('{"module": "keras_hub"}')  # KerasHub's, no vocabulary
    source = json_tokenizer if name == "tokenizer.json" else tokenizer
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(source.serialized)
    found = Tokenizer.from_preset(tmp_path)
    assert found.sha256 == source.sha256
    assert found.path == tmp_path / name


def test_preset_without_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_gemma_ft.presets.resolve_preset", Path, raising=False)
    with pytest.raises(UserError, match="no vocabulary"):
        Tokenizer.from_preset(tmp_path)


def test_files_that_are_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none.model")
    for name, content in [("a.model", b"nonsense"), ("a.json", b"{}"), ("b.json", b"\xff"), ("b.spm", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            Tokenizer.from_file(tmp_path / name)


def test_half_a_surrogate_pair(tokenizer, json_tokenizer):
    for t in (tokenizer, json_tokenizer):
        with pytest.raises(UserError, match="surrogate"):
            t.encode("x\ud83d")
