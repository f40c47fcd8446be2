"""What becomes of conversations that are longer than a row."""

import pytest

from keras_gemma_ft.data.encoding import ScriptEncoder
from keras_gemma_ft.data.mask_contract import MaskContract
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.data.truncation import POLICIES, Truncation


def _conversation(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


THREE = _conversation("one", "ONE", "two", "TWO", "three", "THREE", system="bank")


@pytest.fixture
def shorten(tokenizer):
    """Shortens one conversation to fit the text of another; returns texts, cut flags and counts."""
    encoder, template = ScriptEncoder(tokenizer), Template()

    def of(policy: str, messages, max_length: int):
        short = (_conversation("a", "b"),)  # comes along untouched
        batch = encoder.encode([template.script(m) for m in (messages, *short)])
        result = Truncation(policy, max_length, tokenizer).apply(batch)
        broken = MaskContract(tokenizer).broken(result.batch, result.cut)
        assert (broken == -1).all()
        assert (result.batch.lengths <= max_length).all()
        assert result.source[-1] == 1
        texts = []
        for n in range(len(result.batch) - 1):
            span = slice(result.batch.offsets[n], result.batch.offsets[n + 1])
            texts.append(tokenizer.decode(result.batch.token_ids[span]))
        return texts, result.cut[:-1].tolist(), dict(result.counts)

    return of


@pytest.fixture
def length(tokenizer):
    def of(messages) -> int:
        return len(ScriptEncoder(tokenizer).encode([Template().script(messages)]).token_ids)

    return of


def _text(messages) -> str:
    return str(Template().script(messages)).removeprefix("<bos>")


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_is_left_alone(shorten, length, policy):
    assert shorten(policy, THREE, length(THREE)) == ([_text(THREE)], [False], {})


def test_drop(shorten, length):
    assert shorten("drop", THREE, length(THREE) - 1) == ([], [], {"dropped": 1})


def test_right_keeps_the_beginning_and_counts_the_cut_turn(shorten, length):
    whole = length(THREE)
    texts, cut, counts = shorten("truncate_right", THREE, whole - 3)
    assert _text(THREE).startswith(texts[0])
    assert cut == [True]
    assert counts == {"truncated": 1, "cut_model_turns": 1}
    # Only the line break after the last <turn|> is lost.
    assert shorten("truncate_right", THREE, whole - 1)[1:] == ([False], {"truncated": 1})
    question = length(_conversation("please " * 40))
    long = _conversation("please " * 40, "ONE")
    assert shorten("truncate_right", long, question) == ([], [], {"dropped": 1})


def test_left_drops_the_oldest_turns_and_keeps_the_system_turn(shorten, length):
    for kept in (
        _conversation("two", "TWO", "three", "THREE", system="bank"),
        _conversation("three", "THREE", system="bank"),
    ):
        assert shorten("truncate_left", THREE, length(kept)) == ([_text(kept)], [False], {"truncated": 1})


def test_left_shortens_the_last_question_from_its_beginning(shorten, length):
    long = _conversation("one", "ONE", "x" + " please" * 50, "THREE", system="bank")
    kept = _conversation("x please", "THREE", system="bank")
    texts, cut, counts = shorten("truncate_left", long, length(kept))
    assert cut == [False]
    assert counts == {"truncated": 1}
    assert texts[0].startswith("<|turn>system\nbank<turn|>\n<|turn>user\n")
    assert texts[0].endswith("please<turn|>\n<|turn>model\nTHREE<turn|>\n")
    # An answer that does not fit with any of its question is not cut.
    bare = _conversation("", "THREE", system="bank")
    assert shorten("truncate_left", long, length(bare)) == ([], [], {"dropped": 1})


def test_split_gives_every_answer_once(shorten, length):
    two = _conversation("one", "ONE", "two", "TWO", system="bank")
    last = _conversation("three", "THREE", system="bank")
    assert shorten("split_turns", THREE, length(two)) == (
        [_text(two), _text(last)],
        [False] * 2,
        {"split": 1},
    )
    each = [_conversation(q, q.upper(), system="bank") for q in ("one", "two", "three")]
    texts, _, counts = shorten("split_turns", THREE, max(map(length, each)))
    assert texts == list(map(_text, each))
    assert counts == {"split": 1}


def test_split_counts_exchanges_that_fit_no_row(shorten, length):
    long = _conversation("one", "ONE", "two " * 60, "TWO", "three", "THREE")
    texts, _, counts = shorten("split_turns", long, 30)
    assert texts == [_text(_conversation("one", "ONE")), _text(_conversation("three", "THREE"))]
    assert counts == {"split": 1, "dropped_exchanges": 1}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_length", [16, 24])
def test_system_turns_and_questions_that_fill_the_row(shorten, policy, max_length):
    for messages in (
        _conversation("one", "ONE", system="bank " * 50),
        _conversation("one " * 50),
        [{"role": "assistant", "content": "ONE " * 50}],
        [{"role": "system", "content": "bank " * 50}],
    ):
        texts, cut, counts = shorten(policy, messages, max_length)
        if texts:  # a model turn at the start, cut at the right
            assert policy == "truncate_right"
            assert cut == [True]
        else:
            assert counts.pop("dropped") == 1
            counts.pop("dropped_exchanges", 0)
            assert counts == {}
