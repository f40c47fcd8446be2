"""Preparing: what is on disk, reuse and refusal, errors, streams, workers."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keras_gemma_ft.data import workers
from keras_gemma_ft.data.dataset import PackedDataset
from keras_gemma_ft.data.files import hash_files
from keras_gemma_ft.data.prepare import findings, prepare
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.shards import Recipe, ShardMaker
from keras_gemma_ft.data.template import Template, encode
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.workers import ChunkedWork
from keras_gemma_ft.errors import UserError

RECIPE = Recipe(max_length=128)
SOURCES = {"train.jsonl": "abc"}


def _conversation(question: str, answer: str | None, origin: str = "train.jsonl:1") -> Conversation:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Conversation(messages, origin)


@pytest.fixture
def conversations(random_text) -> list[Conversation]:
    rng = random.Random(0)
    return [
        _conversation(random_text(rng), random_text(rng) + str(n), f"train.jsonl:{n + 1}") for n in range(120)
    ]


def _segments(dataset: PackedDataset) -> set[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Every example of a dataset: its tokens and mask."""
    rows = dataset.rows(range(len(dataset)))
    found = set()
    for ids, segments, mask in zip(rows["token_ids"], rows["segment_ids"], rows["loss_mask"], strict=True):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            found.add((tuple(ids[at].tolist()), tuple(mask[at].tolist())))
    return found


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("packing", [True, False])
def test_rows_on_disk_are_the_encoded_conversations(tmp_path, tokenizer, conversations, packing):
    recipe = Recipe(max_length=512, packing=packing)
    dataset = prepare(conversations, tmp_path / "data", tokenizer, recipe, SOURCES)
    expected = [encode(conversation.messages, tokenizer) for conversation in conversations]
    assert _segments(dataset) == {
        (tuple(e.token_ids.tolist()), tuple(e.loss_mask.tolist())) for e in expected
    }
    counts = dataset.manifest["counts"]
    assert counts["conversations"] == counts["examples"] == 120
    assert counts["rows"] == len(dataset)
    assert (len(dataset) == 120) is not packing
    assert counts["tokens"] == sum(len(e.token_ids) for e in expected)
    assert counts["trained_tokens"] == sum(e.loss_mask.sum() for e in expected)
    spelled = [Template().script(conversation.messages).spelled(tokenizer) for conversation in conversations]
    assert counts["neutralized_tokens"] == sum(map(len, spelled)) > 0
    assert counts["neutralized_conversations"] == sum(map(bool, spelled))
    assert dataset.manifest["efficiency"] == pytest.approx(counts["tokens"] / (len(dataset) * 512), abs=1e-4)


def test_rows_are_mapped_not_read(tmp_path, tokenizer, conversations):
    dataset = prepare(conversations, tmp_path / "data", tokenizer, RECIPE, SOURCES)
    rows = dataset._shards.open(0)
    assert isinstance(rows.token_ids, np.memmap)
    assert (rows.token_ids.dtype, rows.segment_ids.dtype, rows.loss_mask.dtype) == (np.int32, np.uint16, bool)


def test_is_used_again_without_reading_the_input(tmp_path, tokenizer, conversations):
    prepare(conversations, tmp_path / "data", tokenizer, RECIPE, SOURCES)
    before = _files(tmp_path / "data")

    def unread():
        raise AssertionError("the input was read again")
        yield

    again = prepare(unread(), tmp_path / "data", tokenizer, RECIPE, {"renamed.jsonl": "abc"})
    assert again.manifest == json.loads(before["manifest.json"])
    assert _files(tmp_path / "data") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sources": {"train.jsonl": "abd"}}, "other sources"),
        ({"sources": {"train.jsonl": "abc", "more.jsonl": "f"}}, "other sources"),
        ({"recipe": replace(RECIPE, max_length=64)}, r"max_length \(was 128, is 64\)"),
        ({"recipe": replace(RECIPE, template=Template(thinking="off"))}, "other template"),
        ({"recipe": replace(RECIPE, seed=1)}, r"seed \(was 0, is 1\)"),
        ({"on_error": "skip"}, "other on_error"),
    ],
)
def test_is_refused_when_something_changed(tmp_path, tokenizer, conversations, change, named):
    arguments = {"recipe": RECIPE, "sources": SOURCES}
    prepare(conversations, tmp_path / "data", tokenizer, **arguments)
    before = _files(tmp_path / "data")
    with pytest.raises(UserError, match=named):
        prepare(conversations, tmp_path / "data", tokenizer, **{**arguments, **change})
    assert _files(tmp_path / "data") == before


def test_is_refused_with_another_vocabulary(tmp_path, tokenizer, json_tokenizer, conversations):
    prepare(conversations, tmp_path / "data", tokenizer, RECIPE, SOURCES)
    with pytest.raises(UserError, match="other vocabulary"):
        prepare(conversations, tmp_path / "data", json_tokenizer, RECIPE, SOURCES)


def test_other_peoples_directories_are_left_alone(tmp_path, tokenizer, conversations):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="something else"):
        prepare(conversations, tmp_path, tokenizer, RECIPE, SOURCES)
    assert _files(tmp_path) == {"photo.jpg": b"x"}
    with pytest.raises(UserError, match="no prepared dataset"):
        PackedDataset.open(tmp_path)


def test_nothing_is_half_written(tmp_path, tokenizer, conversations):
    def breaks():
        yield from conversations
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(breaks(), tmp_path / "data", tokenizer, RECIPE, SOURCES)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        prepare(conversations, tmp_path / "file" / "data", tokenizer, RECIPE, SOURCES)


BAD = [
    _conversation("Hi", "Hello!", "train.jsonl:1"),
    Conversation([{"role": "user", "content": "Hi"}, {"role": "critic", "content": "x"}], "train.jsonl:2"),
    _conversation("Hi", None, "train.jsonl:3"),
    _conversation("Hi", "Hello!" * 200, "train.jsonl:4"),
]


def test_the_first_bad_conversation_stops(tmp_path, tokenizer):
    with pytest.raises(UserError) as error:
        prepare(BAD, tmp_path / "data", tokenizer, RECIPE, SOURCES)
    assert str(error.value).startswith("train.jsonl:2, message 2: unknown role 'critic'\n")
    with pytest.raises(UserError) as error:
        prepare(BAD[2:0:-1], tmp_path / "data", tokenizer, RECIPE, SOURCES)
    assert str(error.value).startswith("train.jsonl:3: no token is trained")
    with pytest.raises(UserError) as error:
        prepare(BAD[2:], tmp_path / "data", tokenizer, RECIPE, SOURCES)
    assert str(error.value).startswith("train.jsonl:3: no token is trained")
    assert list(tmp_path.iterdir()) == []


def test_bad_conversations_are_skipped_and_counted(tmp_path, tokenizer):
    dataset = prepare(BAD, tmp_path / "data", tokenizer, RECIPE, SOURCES, on_error="skip")
    counts = dataset.manifest["counts"]
    assert [counts[name] for name in ("conversations", "skipped", "dropped", "examples")] == [4, 2, 1, 1]
    assert [problem.split(":")[1][0] for problem in dataset.manifest["problems"]] == ["2", "3"]
    assert findings(dataset.manifest) == [
        "2 of 4 conversations could not be trained on and were left out. The first: train.jsonl:2, "
        "message 2: unknown role 'critic'",
        "1 of 4 conversations were left out: longer than 128 tokens.",
    ]


def test_cut_turns_are_reported(tmp_path, tokenizer):
    recipe = replace(RECIPE, truncation="truncate_right")
    dataset = prepare(BAD[3:], tmp_path / "data", tokenizer, recipe, SOURCES)
    assert findings(dataset.manifest) == [
        "1 of 1 conversations were shortened to 128 tokens (truncate_right).",
        "1 model turns lost their end (<turn|>) and teach no stopping.",
    ]


@pytest.mark.parametrize(
    ("conversations", "complaint"),
    [
        ([], "the dataset is empty"),
        (BAD[1:3], "train.jsonl:2, message 2: no token of the dataset is trained; the first: unknown role"),
        (BAD[3:], "nothing is left to train: 1 conversations are longer than 128 tokens"),
    ],
)
def test_a_dataset_without_a_trained_token_is_an_error(tmp_path, tokenizer, conversations, complaint):
    with pytest.raises(UserError) as error:
        prepare(conversations, tmp_path / "data", tokenizer, RECIPE, SOURCES, on_error="skip")
    assert complaint in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_streams_in_chunks_that_no_number_of_workers_changes(tmp_path, tokenizer, conversations, monkeypatch):
    """Larger than a chunk, the input is read as it is needed, and two processes give the same files."""
    monkeypatch.setattr(workers, "_CHUNK_CHARACTERS", 1500)
    monkeypatch.setattr(workers, "_CHUNK_ROWS", 0)
    read = 0
    unread_at_first_shard = []

    def stream():
        nonlocal read
        for conversation in conversations:
            read += 1
            yield conversation

    first = prepare(
        stream(),
        tmp_path / "one",
        tokenizer,
        RECIPE,
        SOURCES,
        workers=1,
        progress=lambda counts: unread_at_first_shard.append(len(conversations) - read),
    )
    assert unread_at_first_shard[0] > 60
    assert len(first.manifest["shards"]) == len(unread_at_first_shard) > 5
    prepare(conversations, tmp_path / "two", tokenizer, RECIPE, SOURCES, workers=2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def held_signals():
    return _held_signals


def _held_signals(chunk, number):
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_do_not_see_ctrl_c_which_a_terminal_sends_to_all(conversations, monkeypatch):
    monkeypatch.setattr(workers, "_CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(workers, "_CHUNK_ROWS", 0)
    work = ChunkedWork(conversations, 128, workers=2)
    held = list(work.results(held_signals))
    assert len(held) > 2
    assert all(signal.SIGINT in signals for signals in held)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_scripts_without_a_guard_are_told(tmp_path, vocabulary_file):
    """Spawned processes run the script's top level again."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
from keras_gemma_ft.data import Conversation, Recipe, Tokenizer, prepare
tokenizer = Tokenizer.from_file({str(vocabulary_file)!r})
messages = [{{"role": "user", "content": "Hi"}}, {{"role": "model", "content": "Hello!"}}]
prepare([Conversation(messages, "a:1")], {str(tmp_path / "data")!r}, tokenizer, Recipe(), {{}}, workers=2)
""",
        encoding="utf-8",
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert "a worker process died" in result.stderr
    assert 'under `if __name__ == "__main__":`' in result.stderr
    assert list(tmp_path.iterdir()) == [script]


def test_seed_decides_who_shares_a_row(tokenizer, conversations):
    def rows(seed: int) -> np.ndarray:
        return ShardMaker(tokenizer, replace(RECIPE, seed=seed)).rows(conversations)[0].token_ids

    np.testing.assert_array_equal(rows(0), rows(0))
    assert not np.array_equal(rows(0), rows(1))


@pytest.mark.parametrize("left", [0, 10, 500])
def test_damaged_shards_are_an_error(tmp_path, tokenizer, conversations, left):
    dataset = prepare(conversations, tmp_path / "data", tokenizer, RECIPE, SOURCES)
    path = tmp_path / "data" / "rows-00000.loss_mask.npy"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="shard rows-00000"):
        dataset.batch(0, 2)


def test_prepared_data_can_be_moved(tmp_path, tokenizer, conversations):
    dataset = prepare(conversations, tmp_path / "data", tokenizer, RECIPE, SOURCES)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = PackedDataset.open(tmp_path / "moved")
    assert moved.manifest == dataset.manifest
    assert moved.batch(3, 2)["token_ids"].shape == (2, 128)


def test_settings_are_checked():
    with pytest.raises(UserError, match="truncation is 'middle'"):
        Recipe(truncation="middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_length is 3"):
        Recipe(max_length=3)


def test_hash_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc")
    hashes = hash_files([path])
    assert hashes == {str(path): "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    with pytest.raises(UserError, match=r"none\.jsonl"):
        hash_files([tmp_path / "none.jsonl"])


def test_real_vocabulary(tmp_path, real_tokenizer: Tokenizer):
    dataset = prepare(BAD[:1], tmp_path / "data", real_tokenizer, RECIPE, SOURCES)
    ids = dataset.batch(0, 1)["token_ids"][0]
    assert ids[:5].tolist() == [2, 105, 2364, 107, 10979]
