"""Whole runs of the embedded preset in processes of their own, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from keras_gemma_ft.checkpoint import load_weights

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.heavy
SHORT = ("--config=tiny", "--config.train.max_steps=40", "--config.train.eval_every=20")


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts the command; programs compiled by one are there for the next."""
    command = [sys.executable, "-m", "keras_gemma_ft", *arguments]
    environment = {**os.environ, "KERAS_GEMMA_FT_CACHE": str(cache)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def records(run: Path, field: str) -> dict[int, dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record for record in read if field in record}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache) -> Path:
    """A run of 40 steps at once."""
    run = cache / "whole"
    process = start(cache, "train", *SHORT, f"--workdir={run}")
    process.communicate()
    assert process.returncode == 0
    return run


def test_a_run_that_is_killed_and_resumed_is_the_same_run_bit_for_bit(whole, cache):
    run = cache / "killed"
    process = start(cache, "train", *SHORT, f"--workdir={run}")
    while 25 not in records(run, "batch") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert max(records(run, "batch")) < 40
    process = start(cache, "train", f"--workdir={run}", "--resume")
    said, _ = process.communicate()
    assert process.returncode == 0
    assert "going on after step 20 of 40" in said

    ours, theirs = (load_weights(place / "checkpoints", "last") for place in (whole, run))
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    for field in ("batch", "loss"):
        seen = [
            {step: record[field] for step, record in records(place, field).items()} for place in (whole, run)
        ]
        assert seen[0] == seen[1]
        assert list(seen[0]) == list(range(1, 41))


def test_a_run_records_its_audit_and_its_answers(whole):
    (audit,) = (record["audit"] for record in records(whole, "audit").values())
    groups = {group["name"]: group for group in audit["groups"]}
    assert {name.rpartition("/")[2] for name in groups} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(group["gradient_norm"] > 0 and group["update_norm"] > 0 for group in groups.values())
    total = np.sqrt(sum(group["gradient_norm"] ** 2 for group in groups.values()))
    first = records(whole, "grad_norm")[1]
    assert total == pytest.approx(first["grad_norm"], rel=1e-4)
    assert audit["loss"] == pytest.approx(first["loss"])
    samples = records(whole, "samples")
    assert list(samples) == [0, 20, 40]
    for place in range(3):
        prompts = {record["samples"][place]["prompt"] for record in samples.values()}
        assert len(prompts) == 1
        assert all(record["samples"][place]["expected"] for record in samples.values())
    assert samples[0] != {**samples[40], "step": 0}
