"""A file in which everything is wrong that can be: every row is named, and memory stays bounded."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from keras_gemma_ft.data.prepare import prepare
from keras_gemma_ft.data.readers import hold_out, read
from keras_gemma_ft.data.rows import Problem
from keras_gemma_ft.data.shards import Recipe

ROOT = Path(__file__).resolve().parents[2]
LONG = 10_000_000


def good(n):
    return {
        "messages": [
            {"role": "user", "content": f"Question {n}"},
            {"role": "model", "content": f"Answer {n}"},
        ]
    }


def chat(content, role="assistant"):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": role, "content": content}]}


POISON = [
    b"",
    b"   \t",
    b"{}",
    b"null",
    b"[]",
    b"[[[[]]]]",
    b'"text"',
    b"3.5",
    b"{",
    b'{"messages": [}',
    b'{"messages": NaN}',
    b"\xff\xfe\xff",
    b'{"messages": "\xc3\x28"}',
    b'{"messages": "' + b"y" * LONG + b'"}',
    b"[" * 200_000,
    b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    chat(7),
    chat(["x", ["y"]]),
    chat([[["z"]]]),
    chat({"text": "x"}),
    chat(True),
    chat(""),
    chat("\u2003\n"),
    chat("x", role="bot"),
    chat("x", role=""),
    chat("x", role=None),
    chat("x", role=["user"]),
    chat("x", role="user"),
    chat("x", role="tool"),
    chat("\ud800"),
    {"messages": []},
    {"messages": {}},
    {"messages": [None]},
    {"messages": [["user", "Hi"]]},
    {"text": "another file's row"},
    {**good(0), "tools": "weather"},
    {**good(0), "tools": [{"function": 5}]},
    {"messages": [good(0)["messages"][0], {"role": "model", "tool_calls": [{"function": {"name": 3}}]}]},
    {"messages": [good(0)["messages"][0], {"role": "model", "tool_calls": "weather()"}]},
]
EVERY = 7  # good rows after each


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """The file (with a byte order mark and CRLF), and the numbers of the lines that are wrong."""
    path = tmp_path_factory.mktemp("poisoned") / "train.jsonl"
    wrong, number = [], 0
    with path.open("wb") as file:
        file.write(b"\xef\xbb\xbf")
        for poison in POISON:
            for row in [*(good(number + n) for n in range(EVERY)), poison]:
                number += 1
                file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\r\n")
            wrong.append(number)
        file.write(json.dumps(good(number)).encode() + b"\n")
    return path, wrong


def test_every_wrong_row_is_named_and_no_other(poisoned):
    path, wrong = poisoned
    rows = list(read(str(path), on_error="skip"))
    assert len(rows) == len(POISON) * (EVERY + 1) + 1
    named = [row.where.removeprefix(f"{path}:").split(",")[0] for row in rows if isinstance(row, Problem)]
    assert named == list(map(str, wrong))
    assert all(row.what and row.remedy and len(row.what) < 300 for row in rows if isinstance(row, Problem))


def test_what_is_left_is_prepared_and_the_rest_counted(poisoned, tmp_path, tokenizer):
    path, wrong = poisoned
    train, held_out = hold_out(read(str(path), on_error="skip"), 0.1, seed=0)
    recipe = Recipe(max_length=128)
    counts, held = (
        Counter(prepare(part, tmp_path / name, tokenizer, recipe, {}, "skip").manifest["counts"])
        for name, part in (("train", train), ("held_out", held_out))
    )
    sound = len(POISON) * EVERY + 1
    assert (counts["skipped"], held["skipped"]) == (len(wrong), 0)
    assert (counts["examples"], held["examples"]) == (sound - round(0.1 * sound), round(0.1 * sound))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's figures of memory")
def test_memory_stays_bounded(tmp_path):
    """Sound rows, broken ones and one without an end, 110 MB in all, are read in less than half of that."""
    path = tmp_path / "train.jsonl"
    block = b"".join(json.dumps(good(n)).encode() + b"\n{broken\n" for n in range(20_000))
    blocks = 10_000_000 // len(block)
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(block)
        file.write(b'{"messages": "')
        for _ in range(10):
            file.write(b"z" * LONG)
    # Not getrusage: a child starts with its parent's peak.
    script = (
        "import re, sys; from keras_gemma_ft.data.readers import read;"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) >> 10;"
        "before = peak(); rows = sum(1 for _ in read(sys.argv[1], on_error='skip'));"
        "print(rows, peak() - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert result.returncode == 0, result.stderr
    rows, mebibytes = map(int, result.stdout.split())
    assert rows == blocks * 40_000 + 1
    assert mebibytes < 50
