"""What is corrected in a row, and what is left as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_gemma_ft.data.normalize import fix_roles, normalize, plain_spaces
from keras_gemma_ft.data.rows import Conversation


def _row(*messages) -> Conversation:
    return Conversation(list(messages), "a:1")


def test_roles_are_ours_and_unknown_names_are_told():
    row = _row(
        {"role": "System", "content": "s"},
        {"role": "human", "content": "h"},
        {"role": "gpt", "content": "g"},
        {"role": " Bot ", "content": "b"},
        {"role": "assistant", "content": "a"},
        {"role": "function", "content": "f"},
        {"role": "developer", "content": "d"},
        {"role": "human", "content": "h"},
    )
    told = fix_roles(row)
    assert [message["role"] for message in row.messages] == [
        "system",
        "user",
        "model",
        "model",
        "model",
        "tool",
        "developer",
        "user",
    ]
    assert told == [
        "role 'System' is system",
        "role 'human' is user",
        "role 'gpt' is model",
        "role ' Bot ' is model",
        "role 'function' is tool",
    ]


@pytest.mark.parametrize(
    "messages", [None, "text", [1, None], [{"role": 5}], [{"content": "x"}], [{"role": "cat"}]]
)
def test_what_is_no_message_is_left_for_the_check(messages):
    row = Conversation(messages, "a:1")
    assert fix_roles(row) == []
    assert normalize(row) == []
    assert row.messages == messages


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\u2028b\x0cc", "a\nb\nc"),
        ("a\xa0b\u3000c", "a b c"),
        ("\ufeffa\u200bb\x00", "ab"),
        ("a  \t\n  b \n", "a\n  b"),
        ("def f():\n    return 1\n\n\nx", "def f():\n    return 1\n\n\nx"),
        ("a\tb", "a\tb"),
        ("क्\u200dष 👩\u200d🚒", "क्\u200dष 👩\u200d🚒"),
    ],
)
def test_white_space_becomes_plain(text, plain):
    assert plain_spaces(text) == plain


def test_texts_of_all_kinds_are_normalized_and_it_is_told():
    row = _row(
        {"role": "user", "content": [{"type": "text", "text": "cafe\u0301 "}, {"type": "image"}]},
        {"role": "model", "content": "x\r\ny", "reasoning": "e\u0301"},
    )
    assert normalize(row) == ["Unicode in composed form (NFC)", "white space"]
    assert row.messages == [
        {"role": "user", "content": [{"type": "text", "text": "café"}, {"type": "image"}]},
        {"role": "model", "content": "x\ny", "reasoning": "é"},
    ]
    assert normalize(row) == []


@given(st.text())
def test_what_was_normalized_stays_as_it_is(text):
    row = _row({"role": "user", "content": text})
    normalize(row)
    once = row.messages[0]["content"]
    assert normalize(row) == []
    assert row.messages[0]["content"] == once
