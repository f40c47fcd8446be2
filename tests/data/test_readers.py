"""Reading: every layout, and every way in which a row can be wrong, named with its place and remedy."""

import json

import pytest

from keras_gemma_ft.data.readers import read
from keras_gemma_ft.data.rows import Conversation, Problem
from keras_gemma_ft.errors import UserError

ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello!"}
GOOD = {"messages": [ASKED, ANSWERED]}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name, *rows):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return name

    return write


def only(rows):
    (row,) = rows
    assert isinstance(row, Conversation)
    return row


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (GOOD, {}),
        ({"conversations": [ASKED, ANSWERED]}, {}),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}, {}),
        ({"messages": json.dumps(GOOD["messages"])}, {}),
        ({"chat": [ASKED, ANSWERED], "messages": 3}, {"messages": "chat"}),
        ({"prompt": "Hi", "response": "Hello!"}, {}),
        ({"prompt": "Hi", "completion": "Hello!"}, {}),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, {}),
        ({"question": "Hi", "answer": "Hello!", "messages": 3}, {"prompt": "question", "response": "answer"}),
        ({"in": {"text": "Hi"}, "out": "Hello!"}, {"prompt": "in.text", "response": "out"}),
        ({"h": "H", "answer": "Hello!"}, {"template": "{h}{i:i}", "response": "answer"}),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, {}),
    ],
)
def test_layouts_are_told_by_the_columns(file, row, columns):
    got = only(read(file("train.jsonl", row), **columns))
    assert got.messages == [ASKED, ANSWERED]
    assert got.origin == "train.jsonl:1"
    assert got.label is got.tools is None


def test_what_else_a_row_may_hold(file):
    instruction = {"system": "Be kind.", "instruction": "Greet.", "input": "Ann", "output": "Hello, Ann!"}
    messages = only(read(file("a.jsonl", instruction))).messages
    assert [message["content"] for message in messages] == ["Be kind.", "Greet.\n\nAnn", "Hello, Ann!"]
    pair = {"prompt": "Hi", "response": "Hello!", "reasoning": "A greeting.", "topic": 7}
    got = only(read(file("b.jsonl", pair), label="topic"))
    assert got.label == "7"
    assert got.messages[1] == {**ANSWERED, "reasoning": "A greeting."}


def test_tools_and_thoughts_pass_through(file):
    call = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    messages = [
        ASKED,
        {"role": "assistant", "reasoning": "I should look.", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "snow"},
        {"role": "assistant", "content": "Snow."},
    ]
    for tools in ([tool], json.dumps([tool])):
        got = only(read(file("train.jsonl", {"messages": messages, "tools": tools})))
        assert got.messages == messages
        assert got.tools == [tool]


def test_sharegpt_calls(file):
    said = [
        ("human", "Weather?"),
        ("function_call", '{"name": "weather", "arguments": {}}'),
        ("observation", "snow"),
        ("gpt", "Snow."),
    ]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in said]}
    assert only(read(file("train.jsonl", row))).messages == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
        {"role": "tool", "content": "snow"},
        {"role": "assistant", "content": "Snow."},
    ]


def pair(answer):
    return {"messages": [ASKED, answer]}


BAD = {
    "no JSON": (b'{"messages": [', ["is no JSON", "one JSON object a line"]),
    "no object": ([1, [2]], ["the row is a list"]),
    "an empty object": ({}, ["the object is empty"]),
    "an empty line": (b"", ["the line is empty"]),
    "broken UTF-8": (b'{"prompt": "\xff", "response": "a"}', ["not UTF-8", "byte 13"]),
    "half a surrogate pair": (
        rb'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "model", "content": "a"}]}',
        ["message 1", "surrogate"],
    ),
    "ten megabytes": (b'{"messages": "' + b"x" * 10_000_000 + b'"}', ["longer than 8 MiB"]),
    "too deep": (b"[" * 100_000, ["nested too deeply"]),
    "a huge number": (b'{"messages": ' + b"1" * 5000 + b"}", ["is no JSON"]),
    "no messages": ({"messages": []}, ["there are no messages"]),
    "messages as text": ({"messages": "Hi"}, ["column 'messages'", "not JSON"]),
    "messages as a number": ({"messages": 5}, ["column 'messages'", "a number (5)"]),
    "a message as text": (pair("Hello!"), ["message 2", "no object"]),
    "an unknown role": (pair({"role": "robot", "content": "x"}), ["message 2", "'robot'", "assistant"]),
    "no role": (pair({"content": "x"}), ["message 2", "None"]),
    "a role that is a list": (pair({"role": ["user"], "content": "x"}), ["message 2", "unknown role"]),
    "an empty answer": (pair({"role": "assistant", "content": " \n"}), ["message 2", "answer is empty"]),
    "a null answer": (pair({"role": "model", "content": None}), ["message 2 (model)", "answer is empty"]),
    "no answer": ({"messages": [ASKED]}, ["no answer to learn", "role assistant"]),
    "a number for an answer": (pair({"role": "model", "content": 42}), ["message 2", "no text but int"]),
    "nested lists": (pair({"role": "model", "content": [["x"]]}), ["message 2", "'list'"]),
    "a picture": (pair({"role": "model", "content": [{"type": "image"}]}), ["message 2", "'image'"]),
    "tools as a number": ({**GOOD, "tools": 3}, ["tools"]),
    "an uncalled tool": (pair({"role": "tool", "content": "x"}), ["message 2", "was not called"]),
    "other columns": ({"foo": 1}, ["no column 'messages'", "foo", "data."]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_row_is_named(file, case):
    bad, expected = BAD[case]
    name = file("train.jsonl", GOOD, bad, GOOD)
    with pytest.raises(UserError) as caught:
        list(read(name))
    assert caught.value.where.startswith("train.jsonl:2")
    assert caught.value.remedy
    for part in expected:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1_000
    good, problem, last = read(name, on_error="skip")
    assert (good.origin, last.origin) == ("train.jsonl:1", "train.jsonl:3")
    assert isinstance(problem, Problem)
    assert str(problem.error()) == str(caught.value)


PAIR = {"prompt": "Hi", "response": "Hello!"}


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"prompt": "Hi"}, ["no column 'response'", "prompt", "data.response"]),
        ({"prompt": "Hi", "response": ""}, ["column 'response'", "is empty"]),
        ({"prompt": "Hi", "response": None}, ["column 'response'", "null"]),
        ({"prompt": "Hi", "response": 5}, ["column 'response'", "a number (5)", '"5"']),
        ({"prompt": "Hi", "response": True}, ["column 'response'", "true or false"]),
        ({"prompt": "Hi", "response": [["a"]]}, ["column 'response'", "a list", "JSON text"]),
        ({"prompt": " ", "response": "x"}, ["column 'prompt'", "is empty"]),
        ({"prompt": "Hi", "response": "x", "system": 5}, ["column 'system'", "a number"]),
    ],
)
def test_a_wrong_column_is_named(file, bad, expected):
    with pytest.raises(UserError) as caught:
        list(read(file("train.jsonl", PAIR, bad)))
    assert caught.value.where.startswith("train.jsonl:2")
    for part in expected:
        assert part in str(caught.value)


def test_rows_are_counted_as_editors_do(file):
    name = file("train.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", GOOD, b"", b" ")
    assert [row.origin for row in read(name)] == ["train.jsonl:1", "train.jsonl:2"]


@pytest.mark.parametrize("body", [b"", b"\n\n"])
def test_a_file_without_rows_is_named(file, body):
    with pytest.raises(UserError, match=r"train\.jsonl: there are no rows"):
        list(read(file("train.jsonl", body)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: there is no such file"):
        list(read(str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match="no file fits the pattern"):
        list(read(str(tmp_path / "*.jsonl")))


def test_csv(file):
    name = file(
        "train.csv",
        b"\xef\xbb\xbfprompt, response\r",
        b'"Hi, you","Hello!\r',
        b'And ""you""?"\r',
        b"Bye,Bye!\r",
    )
    first, second = read(name)
    assert [message["content"] for message in first.messages] == ["Hi, you", 'Hello!\r\nAnd "you"?']
    assert (first.origin, second.origin) == ("train.csv:2", "train.csv:4")


CSV = {
    "too many fields": (b"a,b,c", ["3 fields, the header 2", '"quotes"']),
    "too few fields": (b"a", ["1 fields, the header 2"]),
    "empty answer": (b"a,", ["column 'response'", "is empty"]),
    "empty line": (b"", ["the line is empty"]),
    "broken UTF-8": (b"a,\xff", ["column 'response'", "not UTF-8"]),
    "a quote in a quote": (b'a,"b"c"', ["malformed"]),
    "ten megabytes": (b"a," + b"x" * 10_000_000, ["longer than 8 MiB"]),
}


@pytest.mark.parametrize("case", CSV)
def test_a_wrong_row_of_csv_is_named(file, case):
    bad, expected = CSV[case]
    with pytest.raises(UserError) as caught:
        list(read(file("train.csv", b"prompt,response", b"a,b", bad, b"a,b")))
    assert caught.value.where.startswith("train.csv:3")
    for part in expected:
        assert part in str(caught.value)


def test_a_quote_that_is_never_closed_is_named_where_it_opens(file):
    with pytest.raises(UserError, match=r"train\.csv:3: the row is malformed"):
        list(read(file("train.csv", b"prompt,response", b"a,b", b'a,"b', *[b"a,b"] * 100)))


def test_missing_columns_of_csv_are_named_with_those_that_are_there(file):
    with pytest.raises(UserError) as caught:
        list(read(file("train.csv", b"prompt,answer", b"a,b")))
    assert "no column 'response'; there are: prompt, answer" in str(caught.value)
    assert "data.response" in caught.value.remedy
    with pytest.raises(UserError, match=r"train\.csv:1: two columns are called 'a'"):
        list(read(file("train.csv", b"a,a", b"a,b")))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("Classify:", "names no column"),
        ("{}", "name no column"),
        ("{text!r}", "name no column"),
        ("{text", "is malformed"),
    ],
)
def test_a_template_that_is_none(template, says):
    with pytest.raises(UserError, match=says) as caught:
        read("train.csv", template=template)
    assert caught.value.where == "data.template"
