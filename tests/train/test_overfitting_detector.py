"""The detector in `fit` of a small Keras model that really overfits, and step by step with given losses."""

import itertools
import json

import numpy as np
import pytest

from keras_gemma_ft.advice import Settings
from keras_gemma_ft.train.overfitting import Reproduction


@pytest.fixture
def overfitting_setup():
    """Twenty noisy rows and a wide network: held-out loss falls, then rises."""
    import keras

    keras.utils.set_random_seed(1)
    generator = np.random.default_rng(1)
    x = generator.normal(size=(220, 10)).astype(np.float32)
    y = (x[:, :1] + generator.normal(0, 0.7, (220, 1))).astype(np.float32)
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    return model, (x[:20], y[:20]), (x[20:], y[20:])


def fit(setup, epochs, **options):
    from keras_gemma_ft.train.callbacks import OverfittingDetector

    model, (x, y), held_out = setup
    detector = OverfittingDetector(
        batch_losses=False, settings=Settings(epochs=epochs, steps_per_epoch=1), **options
    )
    history = model.fit(
        x, y, batch_size=20, epochs=epochs, validation_data=held_out, verbose=0, callbacks=[detector]
    )
    return detector, history.history


def test_an_overfitting_run_is_stopped_and_its_best_weights_come_back(overfitting_setup):
    detector, history = fit(overfitting_setup, 300, action="stop_and_restore_best")
    assert detector.verdicts[-1].kind == "overfitting"
    assert len(history["loss"]) < 300
    model, _, (x, y) = overfitting_setup
    assert model.evaluate(x, y, verbose=0) == pytest.approx(min(history["val_loss"]), rel=1e-5)
    assert min(history["val_loss"]) < 0.9 * history["val_loss"][-1]
    assert "instead of 300" in detector.verdicts[-1].remedies[0]


def test_reporting_changes_nothing(overfitting_setup, tmp_path):
    reported = []
    detector, history = fit(
        overfitting_setup, 80, report=reported.append, metrics_file=tmp_path / "metrics.jsonl"
    )
    assert len(history["loss"]) == 80
    assert len(detector.verdicts) == 80
    kinds = [verdict.kind for verdict in reported]
    assert kinds[0] == "warming up"
    assert "overfitting" in kinds
    assert all(one != other for one, other in itertools.pairwise(kinds))  # only changes are reported
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["verdict"] for record in records] == [verdict.kind for verdict in detector.verdicts]
    assert [record["step"] for record in records] == list(range(1, 81))


def test_the_optimizers_schedule_says_what_is_recent():
    """A healthy cosine run looks flat at its end in steps, and falls in learning rate spent."""
    from keras_gemma_ft.train.callbacks import OverfittingDetector
    from keras_gemma_ft.train.optimizers import adamw

    kinds = []
    for optimizer in (adamw(1.0, warmup_ratio=0.0, total_steps=200), None):
        model = FakeModel()
        if optimizer is not None:
            model.optimizer = optimizer
        rates = 0.5 * (1 + np.cos(np.pi * np.arange(201) / 200))
        losses = 0.5 + 1.5 * np.exp(-np.cumsum(rates) / rates.sum())
        detector = OverfittingDetector(total_steps=200)
        detector.set_model(model)
        detector.on_train_begin()
        detector.record_held_out(losses[0], 0)
        for step in range(1, 201):
            detector.on_train_batch_end(step - 1, {"loss": losses[step]})
            if step % 20 == 0:
                detector.record_held_out(losses[step])
        kinds.append(detector.verdicts[-1].kind)
    assert kinds == ["healthy", "plateau"]


class FakeModel:
    """A model as far as the detector looks at one."""

    def __init__(self, step=0):
        self.optimizer = type("Optimizer", (), {"iterations": step})()
        self.stop_training = False
        self.trainable_variables = []


def replay(train, held_out, every=10, step=0, **options):
    """Feeds losses as `fit` would, and stops where `fit` would."""
    from keras_gemma_ft.train.callbacks import OverfittingDetector

    detector = OverfittingDetector(**options)
    detector.set_model(FakeModel(step))
    detector.on_train_begin()
    detector.on_epoch_begin(0)
    for index, loss in enumerate(train):
        detector.on_train_batch_end(index, {"loss": loss})
        if (index + 1) % every == 0:
            detector.on_test_end({"loss": held_out[(index + 1) // every - 1]})
        if detector.model.stop_training:
            break
    detector.on_train_end()
    return detector


TRAIN = np.geomspace(2.0, 0.05, 200)
HELD_OUT = np.r_[np.linspace(1.8, 1.0, 8), np.linspace(1.05, 2.0, 12)]


def test_patience_is_counted_in_verdicts_and_the_best_checkpoint_is_restored():
    restored = []
    detector = replay(
        TRAIN, HELD_OUT, action="stop_and_restore_best", restore=lambda: restored.append("best")
    )
    kinds = [verdict.kind for verdict in detector.verdicts]
    assert kinds[-2:] == ["overfitting"] * 2
    assert "overfitting" not in kinds[:-2]
    assert restored == ["best"]
    patient = replay(TRAIN, HELD_OUT, action="stop", patience=4)
    assert len(patient.verdicts) == len(kinds) + 2


def test_a_loss_that_is_not_finite_stops_at_once():
    train = TRAIN.copy()
    train[55:] = np.nan
    detector = replay(train, HELD_OUT, action="stop")
    assert [verdict.kind for verdict in detector.verdicts][-1] == "diverged"
    assert detector.verdicts[-1].step == 60


def test_a_healthy_run_is_left_alone():
    detector = replay(np.geomspace(2, 1, 200), np.geomspace(2, 1.05, 20), action="stop")
    assert len(detector.verdicts) == 20
    assert {verdict.kind for verdict in detector.verdicts} == {"warming up", "healthy"}


def test_answers_are_probed_only_once_held_out_stops_falling():
    probed = []

    def probe():
        probed.append(True)
        return Reproduction(32, 32, 0, 32)

    falling = np.r_[np.linspace(2.0, 1.0, 12), np.full(8, 1.0)]
    detector = replay(np.geomspace(2, 0.8, 200), falling, probe=probe)
    kinds = [verdict.kind for verdict in detector.verdicts]
    assert kinds[-1] == "memorizing"
    assert "healthy" in kinds
    assert len(probed) == kinds.count("memorizing")


def test_a_resumed_run_is_judged_with_its_past(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step + 1, "loss": loss, "learning_rate": 1e-4} for step, loss in enumerate(TRAIN[:100])]
    lines += [{"step": 10 * (place + 1), "eval_loss": loss} for place, loss in enumerate(HELD_OUT[:10])]
    lines += [{"step": 105, "loss": 99.0}]  # written after the checkpoint from which the run resumes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    detector = replay(TRAIN[100:], HELD_OUT[10:], step=100, metrics_file=path)
    assert detector.verdicts[0].kind != "warming up"
    assert detector.verdicts[-1].kind == "overfitting"
    assert detector.verdicts[-1].evidence.best_step < 100
    assert detector.verdicts[-1].step == 200


def test_without_held_out_rows_each_epoch_is_judged():
    from keras_gemma_ft.train.callbacks import OverfittingDetector

    detector = OverfittingDetector()
    detector.set_model(FakeModel())
    detector.on_train_begin()
    for epoch in range(2):
        detector.on_epoch_begin(epoch)
        for index in range(50):
            detector.on_train_batch_end(index, {"loss": 2.0 * 0.99 ** (50 * epoch + index)})
        detector.on_epoch_end(epoch, {"loss": 1.0})
    assert [(verdict.step, verdict.kind) for verdict in detector.verdicts] == [
        (50, "healthy"),
        (100, "healthy"),
    ]


def test_evaluation_outside_of_training_is_no_measurement():
    detector = replay(TRAIN[:20], HELD_OUT)
    detector.on_test_end({"loss": 5.0})
    assert len(detector.verdicts) == 2
