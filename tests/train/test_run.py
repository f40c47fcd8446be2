"""A whole run on a toy model: what it leaves behind, and that stopping and going on changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
import toy_run

from keras_gemma_ft import backend, checkpoint
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.run_record import read_run
from keras_gemma_ft.train import run
from keras_gemma_ft.train.batches import Batches
from keras_gemma_ft.train.callbacks import measurements
from keras_gemma_ft.train.callbacks.learning_audit import LearningAudit
from keras_gemma_ft.train.callbacks.validation import held_out_loss

HERE = Path(__file__).parent


def in_a_process(workdir, *options):
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    return subprocess.run(
        [sys.executable, HERE / "toy_run.py", workdir, *options],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """40 steps at once, in a process of their own, fed by tf.data; the others run without TensorFlow."""
    workdir = tmp_path_factory.mktemp("whole")
    result = in_a_process(workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def batches_of(workdir):
    """Fingerprint by step; a step that was run twice must have seen the same batch twice."""
    seen = {}
    for record in read_run(workdir).metrics:
        if "batch" in record:
            assert seen.setdefault(record["step"], record["batch"]) == record["batch"]
    return seen


def assert_same_weights(workdir, other):
    ours, theirs = (checkpoint.load_weights(place / "checkpoints", "last") for place in (workdir, other))
    assert ours.keys() == theirs.keys() == {"adapter", "head"}
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_run_learns_and_leaves_its_files(whole):
    workdir, output = whole
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "manifest.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    record = read_run(workdir)
    steps, losses = record.curve("loss")
    assert steps.tolist() == list(range(1, 41))
    assert losses[-1] < 0.3 * losses[0]
    held_out_steps, held_out = record.curve("eval_loss")
    assert held_out_steps.tolist() == [0, 10, 20, 30, 40]
    assert held_out[-1] < 0.3 * held_out[0]
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["result"]["held_out_loss"] == held_out[-1]
    assert manifest["cost"]["tokens"] > 0
    assert "step 40/40  loss" in output
    assert "tokens/s" in output
    assert "compiled the training step in" in output


def test_records_are_of_the_batches_that_were_trained_on(whole):
    batches = Batches(toy_model.examples().train, 8, seed=0, epochs=8)
    masked_out = 8  # the first token of each of 8 rows
    for record in read_run(whole[0]).metrics:
        if "batch" in record:
            assert record["batch"] == batches.fingerprint(record["step"] - 1)
            assert record["tokens"] == record["supervised_tokens"] + masked_out


def test_tensorboard_can_read_the_scalars(whole):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (events,) = (whole[0] / "tensorboard").iterdir()
    scalars = {}
    for event in EventFileLoader(str(events)).Load():
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 41))
    assert scalars["held_out/loss"][-1][1] == pytest.approx(read_run(whole[0]).curve("eval_loss")[1][-1])
    assert {"train/learning_rate", "speed/tokens_per_second"} <= scalars.keys()


@pytest.mark.parametrize("step", [25, pytest.param(20, marks=pytest.mark.heavy)])
def test_killed_and_resumed_it_ends_bit_for_bit_the_same(whole, step, tmp_path):
    killed = in_a_process(tmp_path, f"--kill={step}", "--no-tensorflow")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(batches_of(tmp_path)) < 40
    resumed = in_a_process(tmp_path, "--resume", "--no-tensorflow")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step" in resumed.stdout
    assert_same_weights(tmp_path, whole[0])
    assert batches_of(tmp_path) == batches_of(whole[0])
    np.testing.assert_array_equal(read_run(tmp_path).curve("loss"), read_run(whole[0]).curve("loss"))


def test_interrupted_it_finishes_the_step_saves_and_says_how_to_go_on(whole, tmp_path):
    stopped = in_a_process(tmp_path, "--signal=13", "--no-tensorflow")
    assert stopped.returncode == 130, stopped.stderr
    assert f"keras-gemma-ft train --workdir={tmp_path} --resume" in stopped.stdout
    assert checkpoint.find(tmp_path / "checkpoints").position == {
        "step": 13,
        "epoch": 2,
        "batch": 3,
        "seed": 0,
    }
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "interrupted"
    resumed = in_a_process(tmp_path, "--resume", "--no-tensorflow")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(tmp_path, whole[0])
    assert batches_of(tmp_path) == batches_of(whole[0])
    # Nothing is left to do, and nothing is undone.
    again = run.fit(toy_model.ToyModel(), toy_model.examples(), toy_run.config(), tmp_path, resume=True)
    assert again.step == 40
    assert_same_weights(tmp_path, whole[0])


def test_another_seed_is_another_run(whole, tmp_path):
    config = toy_run.config()
    config.seed, config.train.max_steps = 1, 5
    result = run.fit(toy_model.ToyModel(), toy_model.examples(), config, tmp_path)
    assert result.step == 5
    assert batches_of(tmp_path)[1] != batches_of(whole[0])[1]


def test_a_run_in_which_something_does_not_learn_is_stopped_and_says_so(tmp_path):
    class Dead(toy_model.ToyModel):
        def train_step(self, state, batch):
            logs, state = super().train_step(state, batch)
            head = next(path for path in logs["squared_gradients"] if path.endswith("head"))
            return {**logs, "squared_gradients": {**logs["squared_gradients"], head: jnp.zeros(())}}, state

    with pytest.raises(UserError, match="head is to be trained but receives no gradient"):
        run.fit(Dead(), toy_model.examples(), toy_run.config(), tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "failed"
    assert read_run(tmp_path).audit is None
    assert checkpoint.find(tmp_path / "checkpoints") is None


def test_the_audits_time_belongs_to_no_step(tmp_path, monkeypatch):
    waited, clock = [0.0], measurements.time.perf_counter
    monkeypatch.setattr(measurements.time, "perf_counter", lambda: clock() + waited[0])
    finish = LearningAudit._finish

    def slowly(audit, logs):
        waited[0] += 10_000.0
        finish(audit, logs)

    monkeypatch.setattr(LearningAudit, "_finish", slowly)
    config = toy_run.config()
    config.train.max_steps = 4
    run.fit(toy_model.ToyModel(), toy_model.examples(), config, tmp_path)
    records = read_run(tmp_path).metrics
    (compiled,) = (record["compile_seconds"] for record in records if "compile_seconds" in record)
    assert compiled < 1_000
    seconds = [record["seconds"] for record in records if "seconds" in record]
    assert len(seconds) == 3
    assert max(seconds) < 1_000


def test_another_process_than_the_first_leaves_nothing_but_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "is_first_process", lambda: False)
    config = toy_run.config()
    config.train.max_steps = 4
    result = run.fit(toy_model.ToyModel(), toy_model.examples(), config, tmp_path)
    assert result.best.step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_the_held_out_loss_is_exact_over_tokens():
    model, data = toy_model.ToyModel(), toy_model.rows(10, seed=3)
    model.compile(optimizer="sgd")
    row = data.rows(range(10))
    loss, (tokens, _) = model._sums(
        *[[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)],
        row,
        False,
    )
    for size in (1, 3, 10):  # uneven batches: a mean of means would differ
        measured, counted = held_out_loss(model, Batches(data, size))
        assert counted == int(tokens)
        assert measured == pytest.approx(float(loss) / int(tokens), rel=1e-6)


def test_rows_that_changed_are_not_resumed_on(tmp_path):
    config = toy_run.config()
    config.train.max_steps = 2
    run.fit(toy_model.ToyModel(), toy_model.examples(), config, tmp_path)
    other = toy_model.Examples(toy_model.rows(40), toy_model.rows(10), 40, 10, {"sha256": "other"})
    with pytest.raises(UserError, match="not those that the run began with"):
        run.fit(toy_model.ToyModel(), other, config, tmp_path, resume=True)


def test_overfitting_stops_the_run_with_the_best_weights(tmp_path):
    config = toy_run.config()
    config.train.update({"epochs": 40, "learning_rate": 0.2, "schedule": "constant", "eval_every": 5})
    config.train.on_overfitting = "stop_and_restore_best"
    # Held-out rows that contradict the training rows: what is learned is wrong there.
    reverse = toy_model.rows(10, seed=1)
    reverse._shards._rows.token_ids[:] = reverse._shards._rows.token_ids[:, ::-1]
    model = toy_model.ToyModel(dropout=0.0)
    result = run.fit(model, toy_model.Examples(toy_model.rows(40), reverse, 40, 10), config, tmp_path)
    assert result.step < 200
    assert result.best.step < result.step
    best = checkpoint.load_weights(tmp_path / "checkpoints", "best")
    np.testing.assert_array_equal(model.head.value, best["head"])
    assert math.isclose(
        result.losses[result.best.step], min(loss for step, loss in result.losses.items() if step)
    )
