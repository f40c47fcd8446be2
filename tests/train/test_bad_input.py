"""What a user can get wrong about data and preset, through the real command line: place, remedy, exit code 2,
nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma_ft import cli

ROOT = Path(__file__).resolve().parents[2]


def row(answer="Fine, thanks.", role="assistant"):
    return {"messages": [{"role": "user", "content": "How are you?"}, {"role": role, "content": answer}]}


def right(count=20):
    return [
        {"prompt": f"How are you, {number}?", "response": f"Fine, thanks, {number}."}
        for number in range(count)
    ]


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
    "no such preset": ("train.jsonl", lines(*right()), ["--config.preset=gemma5"], ["gemma5"]),
    "no rows": ("train.jsonl", "", [], ["train.jsonl"]),
    "misspelt field": (
        "train.jsonl",
        lines(*right()),
        ["--config.train.epoch=2"],
        ["epoch", "train.epochs"],
    ),
    "answers below 0": (
        "train.jsonl",
        lines(*right()),
        ["--config.train.answers=-1"],
        ["train.answers", "-1", "0 or more"],
    ),
    "misspelt choice": (
        "train.jsonl",
        lines(*right()),
        ["--config.train.remat=atuo"],
        ["train.remat", "atuo", "did you mean auto?"],
    ),
    "misspelt tracker": (
        "train.jsonl",
        lines(*right()),
        ["--config.train.trackers=wanbd"],
        ["train.trackers", "wanbd", "did you mean wandb?"],
    ),
    "rank of 0": ("train.jsonl", lines(*right()), ["--config.lora.rank=0"], ["lora.rank", "0"]),
    "no place to write": ("train.jsonl", lines(*right()), ["--workdir=/proc/runs"], ["/proc/runs"]),
}


def arguments_of(case, directory):
    """Writes the case's file; what follows the program's name."""
    name, text, flags, _ = CASES[case]
    (directory / name).write_text(text)
    data = name if name.startswith("train") else "train.jsonl"
    place = f"--workdir={directory / 'runs' / 'first'}"
    return ["train", "--config=tiny", place, f"--config.data.train={directory / data}", *flags]


def check(case, directory, code, said):
    name, _, _, expected = CASES[case]
    assert code == 2, said
    assert 1 <= len(said.splitlines()) <= 3, said
    for part in expected:
        assert part in said
    assert [path.name for path in directory.iterdir()] == [name]


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_named_with_its_remedy_and_nothing_is_left(case, tmp_path, capsys):
    code = cli.main(arguments_of(case, tmp_path))
    check(case, tmp_path, code, capsys.readouterr().err)


def test_so_it_is_for_the_process(tmp_path):
    case = "malformed JSON"
    result = subprocess.run(
        [sys.executable, "-m", "keras_gemma_ft", *arguments_of(case, tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    check(case, tmp_path, result.returncode, result.stderr)
