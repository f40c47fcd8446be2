"""Measurements: read a step late, complete, and without the pauses between steps."""

import jax
import keras
import pytest
import toy_model

from keras_gemma_ft.train.batches import Batches
from keras_gemma_ft.train.callbacks import measurements as module
from keras_gemma_ft.train.callbacks.lazy_logs import LazyLogs
from keras_gemma_ft.train.callbacks.measurements import Measurements
from keras_gemma_ft.train.metrics_file import MetricsFile
from keras_gemma_ft.train.optimizers import adamw


class Kept:
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


class OnDevice:
    """A loss that notes when the host reads it."""

    def __init__(self, step, events):
        self.step, self.events = step, events

    def __float__(self):
        self.events.append(f"read {self.step}")
        return float(self.step)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_a_loss_is_read_when_the_next_step_is_under_way(clock):
    events, kept = [], Kept()
    measure = Measurements(Batches(toy_model.rows(12), 4, seed=0), [kept], lambda step: 0.1)
    for step in range(3):
        measure.on_train_batch_begin(step)
        events.append(f"dispatched {step}")
        measure.on_train_batch_end(step, {"loss": OnDevice(step, events), "tokens": 5})
    assert events == ["dispatched 0", "dispatched 1", "read 0", "dispatched 2", "read 1"]
    measure.on_epoch_end(0)
    assert events[-1] == "read 2"
    assert [record["step"] for record in kept.records if "loss" in record] == [1, 2, 3]


def test_time_is_that_of_steps_alone(clock):
    kept = Kept()
    measure = Measurements(Batches(toy_model.rows(40), 4, seed=0), [kept], lambda step: 0.1)
    for step, (dispatch, pause) in enumerate([(30.0, 0), (2.0, 0), (2.0, 100.0), (2.0, 0), (2.0, 0)]):
        measure.on_train_batch_begin(step)
        clock[0] += dispatch
        measure.on_train_batch_end(step, {"loss": 1.0})
        if pause:
            measure.settle()
            clock[0] += pause
    measure.settle()
    assert measure.compile_seconds == 30.0
    assert kept.records[0] == {"step": 0, "compile_seconds": 30.0}
    seconds = [record["seconds"] for record in kept.records if "seconds" in record]
    assert seconds == [2.0, 2.0, 2.0, 2.0]
    assert measure.seconds == 8.0


def test_a_device_that_is_waited_for_is_timed_by_when_it_is_done(clock):
    class Slow(OnDevice):
        def is_ready(self):
            return False

        def __float__(self):
            clock[0] = max(clock[0], 5.0 * (self.step + 1))  # done then, and asked for before
            return 1.0

    kept = Kept()
    measure = Measurements(Batches(toy_model.rows(40), 4, seed=0), [kept], lambda step: 0.1)
    for step in range(4):
        measure.on_train_batch_begin(step)
        clock[0] += 0.01
        measure.on_train_batch_end(step, {"loss": Slow(step, [])})
    measure.settle()
    assert [record["seconds"] for record in kept.records if "seconds" in record] == [5.0, 5.0, 5.0]


def test_utilization_is_throughput_over_that_at_the_peak(clock):
    kept = Kept()
    measure = Measurements(Batches(toy_model.rows(40), 4, seed=0), [kept], lambda step: 0.1, 50.0)
    for step in range(3):
        measure.on_train_batch_begin(step)
        clock[0] += 2.0
        measure.on_train_batch_end(step, {"loss": 1.0})
    measure.settle()
    records = [record for record in kept.records if "mfu" in record]
    assert len(records) == 2
    for record in records:
        assert record["mfu"] == pytest.approx(record["tokens"] / 2.0 / 50.0, abs=1e-4)


def test_a_dispatch_that_returns_at_once_is_no_step(clock):
    """A device that takes one step ahead: after a pause the first dispatch returns, the next waits for it."""

    class Queued(OnDevice):
        def is_ready(self):
            return clock[0] >= done[self.step]

    kept, done = Kept(), []
    measure = Measurements(Batches(toy_model.rows(40), 4, seed=0), [kept], lambda step: 0.1)
    for step, took in enumerate([10.0, 0.01, 5.0, 5.0, 5.0]):  # until dispatches return; a step takes 5 s
        measure.on_train_batch_begin(step)
        clock[0] += took
        done.append(clock[0] + (5.0 if step else 0.0))
        measure.on_train_batch_end(step, {"loss": Queued(step, [])})
        if step == 0:
            measure.settle()
    seconds = [record["seconds"] for record in kept.records if "seconds" in record]
    assert seconds == pytest.approx([5.01, 5.0, 5.0])


@pytest.mark.parametrize(
    ("ended", "seconds"),
    [
        (5.5, [2.0, 3.0, 1.0]),  # in the pause after its dispatch: seen as the next step begins
        (6.5, [2.0, 3.5, 0.5]),  # while the next is dispatched, which ends in its own dispatch
    ],
)
def test_no_step_loses_its_time_to_the_one_before(clock, ended, seconds):
    """A dispatch takes a second and so does the pause after it; step 2 ends later than its dispatch."""

    class Ending(OnDevice):
        def is_ready(self):
            return self.step != 2 or clock[0] >= ended

    kept = Kept()
    measure = Measurements(Batches(toy_model.rows(40), 4, seed=0), [kept], lambda step: 0.1)
    for step in range(4):
        measure.on_train_batch_begin(step)
        clock[0] += 1.0
        measure.on_train_batch_end(step, {"loss": Ending(step, [])})
        clock[0] += 1.0
    measure.settle()
    assert [record["seconds"] for record in kept.records if "seconds" in record] == seconds


def test_callbacks_get_device_arrays_and_keras_would_give_numbers():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(type(logs["loss"]))

    model = toy_model.ToyModel()
    model.compile(optimizer=adamw(1e-2, total_steps=10))
    batches = Batches(toy_model.rows(8), 4, seed=0)
    model.fit(batches, verbose=0, shuffle=False, callbacks=LazyLogs([Look()], model, 2))
    model.fit(batches, verbose=0, shuffle=False, callbacks=[Look()])
    assert issubclass(seen[0], jax.Array)
    assert seen[-1] is float


def test_a_torn_last_line_is_cut_off_before_going_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    metrics = MetricsFile(path)
    metrics.write({"step": 2, "loss": float("nan")})
    metrics.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": null}\n'
