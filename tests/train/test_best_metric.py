"""The best checkpoint by any metric that a held-out measurement gives: chosen, kept, restored, said."""

import json
import math
import signal

import numpy as np
import pytest
import toy_model
import toy_run

from keras_gemma_ft import checkpoint
from keras_gemma_ft.best_metric import NAMES, TASK_METRICS, rank
from keras_gemma_ft.config import validate
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.report import write_report
from keras_gemma_ft.evaluate.run_record import read_run
from keras_gemma_ft.evaluate.tasks import build_task
from keras_gemma_ft.train import run
from keras_gemma_ft.train.interruption import Interrupted
from keras_gemma_ft.train.overfitting import Reproduction
from keras_gemma_ft.train.task_metric import TaskMetric


class Scores:
    """Answers whose score at each measurement, the first before training, is given."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def samples(self):
        return [], self.scores.pop(0)

    def reproduction(self):
        return Reproduction(0, 8, 0, 8)


def config(metric="accuracy", **train):
    made = toy_run.config()
    made.train.update({"best_metric": metric, **train})
    return made


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


class Weights(toy_model.keras.callbacks.Callback):
    """The head after every step."""

    def __init__(self):
        super().__init__()
        self.heads = {}

    def on_train_batch_end(self, batch, logs=None):
        self.model.jax_state_sync()
        self.heads[batch + 1] = np.array(self.model.head.value)


def test_a_metric_that_disagrees_with_the_loss_chooses_another_step(tmp_path, capsys):
    weights = Weights()
    result = run.fit(
        toy_model.ToyModel(),
        toy_model.examples(),
        config(),
        tmp_path,
        answers=Scores(0.9, 0.25, 0.75, 0.5, 0.5),  # step 0 is no checkpoint
        callbacks=[weights],
    )
    assert min(result.losses, key=result.losses.get) == 40
    assert kept(tmp_path) == [20, 40]
    best = checkpoint.find(tmp_path / "checkpoints", "best")
    assert best == result.best
    assert (best.step, best.metric, best.value) == (20, "accuracy", 0.75)
    assert best.eval_loss == result.losses[20]
    stored = checkpoint.load_weights(tmp_path / "checkpoints", "best")
    np.testing.assert_array_equal(stored["head"], weights.heads[20])

    said = capsys.readouterr().out
    assert f"step 20: held-out loss {result.losses[20]:.4f}, accuracy 0.7500" in said
    assert f"best held-out accuracy 0.7500 at step 20, held-out loss {result.losses[20]:.4f}" in said
    manifest = json.loads((tmp_path / "manifest.json").read_text())["result"]
    assert (manifest["best_step"], manifest["best_metric"], manifest["best_value"]) == (20, "accuracy", 0.75)
    steps, values = read_run(tmp_path).curve("eval_accuracy")
    assert dict(zip(steps, values, strict=True)) == {0: 0.9, 10: 0.25, 20: 0.75, 30: 0.5, 40: 0.5}
    write_report(tmp_path)
    assert "best by accuracy: step 20" in (tmp_path / "report.html").read_text()
    assert "best checkpoint: step 20, held-out accuracy 0.750" in (tmp_path / "report.md").read_text()


def test_by_the_loss_the_same_run_keeps_its_last_step(tmp_path):
    result = run.fit(toy_model.ToyModel(), toy_model.examples(), config("loss"), tmp_path)
    assert (result.best.step, result.best.metric, kept(tmp_path)) == (40, "loss", [40])


def test_perplexity_is_the_losss_exponential(tmp_path):
    result = run.fit(toy_model.ToyModel(), toy_model.examples(), config("perplexity", max_steps=10), tmp_path)
    assert result.best.value == pytest.approx(math.exp(result.losses[10]))
    assert read_run(tmp_path).curve("eval_perplexity")[0].tolist() == [0, 10]


def test_of_equal_values_the_lower_loss_is_better_and_no_number_is_worst():
    measured = [("b", 0.5, 0.9), ("a", 0.5, 1.0), ("c", 0.25, 0.1), ("d", math.nan, 0.1)]
    assert [name for name, *at in sorted(measured, key=lambda m: rank("accuracy", *m[1:]))] == list("dcab")
    losses = [("a", 0.5), ("b", 0.4), ("c", math.nan)]
    assert [name for name, loss in sorted(losses, key=lambda m: rank("loss", m[1], m[1]))] == list("cab")


def test_equal_shares_keep_one_checkpoint_and_all_agree_on_which(tmp_path):
    result = run.fit(
        toy_model.ToyModel(), toy_model.examples(), config(), tmp_path, answers=Scores(0, 0.5, 0.5, 0.5, 0.25)
    )
    assert result.losses[30] < result.losses[20] < result.losses[10]
    assert (result.best.step, kept(tmp_path)) == (30, [30, 40])
    assert read_run(tmp_path).best[:3] == ("accuracy", 30, 0.5)


def test_a_resumed_run_keeps_the_best_of_before(tmp_path):
    with pytest.raises(Interrupted):
        run.fit(
            toy_model.ToyModel(),
            toy_model.examples(),
            config(),
            tmp_path,
            answers=Scores(0, 0.25, 0.75),
            callbacks=[toy_run.SendAt(signal.SIGINT, 23)],
        )
    assert kept(tmp_path) == [20, 23]
    result = run.fit(
        toy_model.ToyModel(),
        toy_model.examples(),
        config(),
        tmp_path,
        answers=Scores(0.5, 0.625),
        resume=True,
    )
    assert (result.best.step, result.best.value, kept(tmp_path)) == (20, 0.75, [20, 40])
    assert read_run(tmp_path).best[:3] == ("accuracy", 20, 0.75)


def test_what_is_restored_is_the_best_by_the_metric_even_of_before_a_resume(tmp_path, capsys):
    made = config(epochs=40, learning_rate=0.2, schedule="constant", eval_every=5)
    made.train.on_overfitting = "stop_and_restore_best"
    reverse = toy_model.rows(10, seed=1)
    reverse._shards._rows.token_ids[:] = reverse._shards._rows.token_ids[:, ::-1]
    examples = toy_model.Examples(toy_model.rows(40), reverse, 40, 10)
    weights, model = Weights(), toy_model.ToyModel(dropout=0.0)
    scores = Scores(0, 0.5, 0.75, *[0.25] * 40)
    stop = toy_run.SendAt(signal.SIGINT, 12)
    with pytest.raises(Interrupted):
        run.fit(model, examples, made, tmp_path, answers=scores, callbacks=[weights, stop])
    model = toy_model.ToyModel(dropout=0.0)
    result = run.fit(model, examples, made, tmp_path, answers=scores, resume=True)
    assert result.step < 200
    steps, losses = read_run(tmp_path).curve("eval_loss")
    assert steps[1:][np.argmin(losses[1:])] == 5
    assert result.best.step == 10
    np.testing.assert_array_equal(model.head.value, weights.heads[10])
    assert "the weights of step 10 are back: best held-out accuracy 0.7500" in capsys.readouterr().out


ROWS = {
    "classification": [{"prompt": f"Classify: {n}", "expected": "ab"[n % 2]} for n in range(12)],
    "extraction": [{"prompt": f"at {n}", "expected": f'{{"time": "{n}"}}'} for n in range(12)],
    "numeric": [{"prompt": f"{n} and 1?", "expected": f"so\n#### {n + 1}"} for n in range(12)],
    "generation": [{"prompt": "why", "expected": f"because of this and that, {n}, " * 5} for n in range(12)],
}


@pytest.mark.parametrize("kind", TASK_METRICS)
def test_names_and_directions_are_those_of_evaluate(kind):
    rows = ROWS[kind]
    examples = [
        Example(({"role": "user", "content": row["prompt"]},), row["expected"].strip()) for row in rows
    ]
    task = build_task("auto", examples)
    assert task.kind == kind
    references = [example.reference for example in examples]
    scored = task.score(references, references, examples).metrics
    assert tuple(metric.name for metric in scored) == TASK_METRICS[kind]
    assert {metric.better for metric in scored} == {"higher"}
    right = [{**row, "answer": row["expected"]} for row in rows]
    # Some answers have no form at all, and some are only wrong, without which no precision would fall.
    wrong = ["?", '{"time": "?"}']
    half = right[:6] + [{**row, "answer": wrong[place % 2]} for place, row in enumerate(rows[6:])]
    for name in TASK_METRICS[kind]:
        metric = TaskMetric(name, "auto", rows)
        assert metric(right) > metric(half)
    assert set(TASK_METRICS[kind]) < set(NAMES)


def test_an_answer_is_a_label_of_all_rows_not_of_the_few_that_are_asked():
    rows = [{"prompt": str(n), "expected": ("top up", "top up limits")[n % 2]} for n in range(12)]
    asked = [{**rows[0], "answer": "top up limits"}]
    assert TaskMetric("accuracy", "auto", rows)(asked) == 0.0
    assert TaskMetric("valid", "auto", rows)(asked) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"best_metric": "acuracy"},
            r"did you mean accuracy\? Choose loss, perplexity, accuracy, .* or chrf",
        ),
        ({"best_metric": "accuracy", "answers": 0}, "train.answers is 0"),
        (
            {"best_metric": "slot_f1", "kind": "classification"},
            "choose loss, perplexity, accuracy, macro_f1, ",
        ),
        ({"best_metric": "accuracy", "kind": "instructions"}, "choose loss or perplexity"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_can(changes, message):
    made = toy_run.config()
    made.task.kind = changes.pop("kind", "auto")
    made.train.update(changes)
    with pytest.raises(UserError, match=r"train\.best_metric: ") as error:
        validate(made)
    assert error.match(message)


def test_what_the_rows_do_not_give_is_refused_before_training(tmp_path):
    spans = [{"prompt": f"at {n} pm please", "expected": f"{n} pm"} for n in range(12)]
    with pytest.raises(
        UserError, match="whose task is extraction\n  choose one of loss, perplexity, exact_match"
    ):
        TaskMetric("slot_f1", "auto", spans)
    with pytest.raises(UserError, match="none are given"):
        run.fit(toy_model.ToyModel(), toy_model.examples(), config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
