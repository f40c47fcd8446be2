"""The command line as a user meets it: in a process of its own, by its exit code and what it prints."""

import os
import subprocess
import sys

import pytest

from keras_gemma_ft.cli import VERBS, parse
from keras_gemma_ft.errors import UserError


def cli(*arguments, cwd=None):
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "keras_gemma_ft", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_the_overview_lists_the_verbs(arguments):
    result = cli(*arguments)
    assert result.returncode == 0, result.stderr
    for name, verb in VERBS.items():
        assert f"  {name}" in result.stdout
        assert verb.help in result.stdout


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from keras_gemma_ft import cli; assert cli.main(['train', '--help']) == 0;"
        "print(sorted({'jax', 'keras', 'tensorflow', 'orbax'} & sys.modules.keys()), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().endswith("[]")
    assert "lora.rank = 16" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "place", "remedy"),
    [
        (["trian"], "trian", "did you mean train?"),
        (["train"], "--workdir", "add --workdir=DIR"),
        (["train", "--wrokdir=x"], "--wrokdir", "did you mean --workdir?"),
        (["train", "--workdir=x"], "--config", "--config=tiny"),
        (["train", "--workdir=x", "--config=tinny"], "--config=tinny", "did you mean tiny?"),
        (
            ["train", "--workdir=x", "--config=tiny", "--config.lora.rnak=2"],
            "lora.rnak",
            "did you mean lora.rank?",
        ),
        (
            ["train", "--workdir=x", "--config=tiny", "--config.data.train=t", "--config.lora.rank=0"],
            "lora.rank",
            "1 or more",
        ),
        (
            ["train", "--workdir=x", "--config=tiny", "--config.lora.rank=two"],
            "lora.rank",
            "width of each adapter",
        ),
        (["train", "--workdir=x", "--config=tiny", "extra"], "extra", "flags begin with --"),
        (["train", "--workdir=x", "--resume"], "--workdir=x", "of a run"),
    ],
)
def test_a_fault_is_three_lines_at_most_with_place_and_remedy(arguments, place, remedy, tmp_path):
    result = cli(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) <= 3, result.stderr
    assert result.stderr.startswith(f"keras-gemma-ft: {place}:")
    assert remedy in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "place", "says"),
    [
        ("config.lora.rnak = 3", "recipe.py:4", "did you mean lora.rank?"),
        ("config.lora.rank = 'x'", "recipe.py:4", "TypeError"),
        ("config = 5", "recipe.py", "returned int"),
        ("config = (", "recipe.py:", "SyntaxError"),
    ],
)
def test_a_faulty_recipe_is_named_by_file_and_line(body, place, says, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from keras_gemma_ft.config import default_config\ndef get_config():\n    config = default_config()\n"
        f"    {body}\n    return config\n"
    )
    with pytest.raises(UserError) as error:
        parse("train", [f"--config={recipe}", "--workdir=x"])
    assert place in error.value.where
    assert says in str(error.value)


def test_flags_change_the_recipe():
    config, given = parse(
        "train",
        [
            "--config=configs/tiny.py",
            "--workdir=runs/x",
            "--config.data.train=t.jsonl",
            "--config.lora.rank=32",
            "--config.lora.alpha",
            "8",
            "--noconfig.data.packing",
            "--config.train.clip_norm=None",
        ],
    )
    assert (config.lora.rank, config.lora.alpha, config.data.packing) == (32, 8.0, False)
    assert config.train.clip_norm is None
    assert config.data.train == "t.jsonl"
    assert (given.workdir, given.resume) == ("runs/x", False)


def test_held_out_rows_of_a_recipe_do_not_follow_to_other_training_rows():
    config, _ = parse("train", ["--config=tiny", "--workdir=x"])
    assert config.data.eval
    config, _ = parse("train", ["--config=tiny", "--workdir=x", "--config.data.train=mine.jsonl"])
    assert config.data.eval is None
    own = ["--config.data.train=mine.jsonl", "--config.data.eval=other.jsonl"]
    config, _ = parse("train", ["--config=tiny", "--workdir=x", *own])
    assert config.data.eval == "other.jsonl"
