"""`data prepare` through the command line, and what `train` makes of it on a machine that has little else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def preset(shared, tmp_path):
    """The vocabulary and the configuration of a preset, without weights."""
    folder = tmp_path / "preset"
    folder.mkdir()
    shutil.copy(shared / "model_configs" / "e2b.json", folder / "config.json")
    (folder / "tokenizer.model").symlink_to(shared / "tokenizer" / "gemma4.model")
    return folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "train.csv"
    rows = [f"What is {n} + 1?,{n + 1}\n" for n in range(100)]
    rows[40] = "What is 40 + 1?,\n"
    path.write_text("question,answer\n" + "".join(rows))
    return path


def run(*arguments, script=None):
    return subprocess.run(
        [sys.executable, *(["-c", script] if script else ["-m", "keras_gemma_ft"]), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        timeout=300,
    )


def flags(tmp_path, preset, source):
    return [
        "--config=tiny",
        "--config.data.eval=None",
        f"--workdir={tmp_path / 'run'}",
        f"--config.preset={preset}",
        f"--config.data.train={source}",
        "--config.data.prompt=question",
        "--config.data.response=answer",
        "--config.data.max_length=64",
    ]


PREPARED_ELSEWHERE = """
import sys
from pathlib import Path
sys.modules["tensorflow"] = None
from keras_gemma_ft.cli import parse
from keras_gemma_ft.train.examples import prepare_examples
config, given = parse("data prepare", sys.argv[1:])
examples = prepare_examples(config, Path(given.workdir) / "data", print)
print(examples.train_examples, examples.held_out_examples)
"""


def test_rows_are_prepared_counted_and_used_where_their_source_is_not(tmp_path, preset, source):
    given = flags(tmp_path, preset, source)
    stopped = run("data", "prepare", *given)
    assert stopped.returncode == 2
    assert f"{source}:42, column 'answer': is empty" in stopped.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["preset", "train.csv"]
    given.append("--config.data.on_error=skip")
    made = run("data", "prepare", *given)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[:2] == [
        f"{source}: CSV, 'question' answered by 'answer'",
        "train data: 1 of 90 conversations could not be trained on and were left out. "
        f"The first: {source}:42, column 'answer': is empty",
    ]
    assert "training: 89 of 90 conversations in" in made.stdout
    assert "held out: 10 of 10 conversations in" in made.stdout
    counts = json.loads((tmp_path / "run/data/train/manifest.json").read_text())["counts"]
    assert counts["examples"] == 89
    assert f"{counts['trained_tokens']:,} of {counts['tokens']:,} tokens are trained" in made.stdout

    source.unlink()
    used = run(*given, script=PREPARED_ELSEWHERE)
    assert used.returncode == 0, used.stderr
    assert "there is no such file; the rows that were prepared from it are used" in used.stdout
    assert used.stdout.splitlines()[-1] == "89 10"
    other = run(*given, "--config.data.template={question}", script=PREPARED_ELSEWHERE)
    assert "the prepared data were made with other sources" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data"], "data: there is no such verb\n  There are: data prepare, data inspect"),
        (["data", "inspcet"], "data inspcet: there is no such verb\n  did you mean data inspect?"),
        (["data", "prepare", "--config=tiny"], "--workdir: no run directory is given"),
        (["data", "inspect", "--config=e4b_lora"], "data.train: no training file is given"),
        (["data", "inspect", "--workdir=x"], "--workdir: there is no such flag"),
    ],
)
def test_sub_verbs_that_are_misspelt_or_lack_something(arguments, says):
    result = run(*arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) <= 3


def test_help_of_a_family_lists_it():
    result = run("data", "--help")
    assert result.returncode == 0
    assert "  data prepare" in result.stdout
    assert "  train" not in result.stdout
