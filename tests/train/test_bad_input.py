"""What a user can get wrong about data and preset, through the real command line: place, remedy, exit code 2,
nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def row(answer="Fine, thanks.", role="assistant"):
    return {"messages": [{"role": "user", "content": "How are you?"}, {"role": role, "content": answer}]}


def lines(*rows):
    return "".join((json.dumps(each) if isinstance(each, dict) else each) + "\n" for each in rows)


CASES = {
    "malformed JSON": ("train.jsonl", lines(*[row()] * 6, '{"messages": [', row()), [], ["train.jsonl:7"]),
    "unknown role": (
        "train.jsonl",
        lines(row(), row(role="robot")),
        [],
        ["train.jsonl:2", "robot", "assistant"],
    ),
    "empty answer": ("train.jsonl", lines(row(), row(), row("  ")), [], ["train.jsonl:3"]),
    "missing column": (
        "train.csv",
        "prompt,answer\nHow are you?,Fine.\n",
        [],
        ["train.csv", "response", "data.response"],
    ),
    "no file": ("other.jsonl", lines(row()), [], ["train.jsonl"]),
    "no such preset": ("train.jsonl", lines(*[row()] * 20), ["--config.preset=gemma5"], ["gemma5"]),
    "no rows": ("train.jsonl", "", [], ["train.jsonl"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_named_with_its_remedy_and_nothing_is_left(case, tmp_path):
    name, text, flags, expected = CASES[case]
    (tmp_path / name).write_text(text)
    data = name if name.startswith("train") else "train.jsonl"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "keras_gemma_ft",
            "train",
            "--config=tiny",
            f"--workdir={tmp_path / 'runs' / 'first'}",
            f"--config.data.train={tmp_path / data}",
            *flags,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert 1 <= len(result.stderr.splitlines()) <= 3, result.stderr
    for part in expected:
        assert part in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]
