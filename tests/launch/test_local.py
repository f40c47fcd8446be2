"""The local launcher: what it starts, and when it starts it again."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("launch_local", ROOT / "launch" / "local.py")
local = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(local)


def test_the_command_line_is_passed_on_and_a_run_is_resumed(tmp_path):
    arguments = ["train", "--config=tiny", f"--workdir={tmp_path}", "--config.lora.rank=8"]
    assert local.command(arguments) == [sys.executable, "-m", "keras_gemma_ft", *arguments]
    (tmp_path / "config.json").touch()
    assert local.command(arguments)[-1] == "--resume"
    assert local.command([*arguments, "--resume"]).count("--resume") == 1
    assert "--resume" not in local.command(["export", f"--workdir={tmp_path}"])


def test_only_chosen_devices_are_seen():
    assert local.environment("0,2", {"A": "b"})["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert local.environment(None, {"A": "b"}) == {"A": "b"}


@pytest.mark.parametrize(("codes", "runs"), [([1, 137, 0], 3), ([2], 1), ([130], 1), ([1, 1, 1, 1], 4)])
def test_crashes_are_restarted_and_faults_are_not(codes, runs, tmp_path, monkeypatch):
    left, started = list(codes), []

    def run(process, environment, log):
        started.append(process)
        return left.pop(0)

    monkeypatch.setattr(local, "_run", run)
    assert local.launch(["train", f"--workdir={tmp_path / 'run'}"], restarts=3) == codes[-1]
    assert len(started) == runs


def test_output_is_kept_and_the_exit_code_returned(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "launch" / "local.py", "train", f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "no config is given" in result.stdout
    assert (tmp_path / "run.log").read_text() == result.stdout
