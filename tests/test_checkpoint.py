"""Checkpoints: what is in them, which are kept, and that a broken one is never the latest."""

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_gemma_ft import checkpoint
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.train.optimizers import adamw


def model(width=3, steps=2):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, name="base", trainable=False)(inputs)
    hidden = keras.layers.Dropout(0.3, name="drop", seed=3)(hidden)
    built = keras.Model(inputs, keras.layers.Dense(width, name="adapter")(hidden))
    built.compile(optimizer=adamw(1e-2, total_steps=50), loss="mse")
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    if steps:
        built.fit(x, x[:, :width], epochs=steps, batch_size=8, verbose=0)
    return built


def arrays(built):
    return {
        part: {name: np.array(v.value) for name, v in items.items()}
        for part, items in checkpoint._state(built).items()
    }


def test_state_comes_back_and_the_frozen_base_is_not_in_it(tmp_path):
    trained = model()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained, 2, eval_loss=0.5, position={"epoch": 1})
    fresh = model(steps=0)
    base = np.array(fresh.get_layer("base").kernel.value)
    saved = checkpoint.restore(fresh, tmp_path, resume=True)
    assert saved == checkpoint.Saved(2, 0.5, {"epoch": 1}, "loss", 0.5)
    for part, items in arrays(trained).items():
        assert items, part
        for name, value in items.items():
            np.testing.assert_array_equal(value, arrays(fresh)[part][name], err_msg=f"{part} {name}")
    np.testing.assert_array_equal(base, fresh.get_layer("base").kernel.value)
    stored = checkpoint.load_weights(tmp_path)
    assert set(stored) == {"adapter/kernel", "adapter/bias"}
    np.testing.assert_array_equal(stored["adapter/kernel"], trained.get_layer("adapter").kernel.value)


def test_a_restored_model_goes_on_exactly(tmp_path):
    x = np.random.default_rng(5).normal(size=(8, 4)).astype(np.float32)
    trained, fresh = model(), model(steps=0)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained, 2)
    checkpoint.restore(fresh, tmp_path, resume=True)
    for each in (trained, fresh):
        each.fit(x, x[:, :3], epochs=3, batch_size=4, shuffle=False, verbose=0)
    for part, items in arrays(trained).items():
        for name, value in items.items():
            np.testing.assert_array_equal(value, arrays(fresh)[part][name], err_msg=f"{part} {name}")


def test_best_and_last_are_kept(tmp_path):
    trained = model()
    losses = {5: 2.0, 10: 1.0, 15: 1.5, 20: float("nan"), 25: None, 30: 1.2}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(trained, step, eval_loss=loss)
            assert checkpoints.last_step == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "30"]
    assert checkpoint.find(tmp_path, "best").step == 10
    assert checkpoint.find(tmp_path, "last").step == 30
    assert checkpoint.find(tmp_path, 10).eval_loss == 1.0
    assert checkpoint.find(tmp_path, 15) is None


def test_a_model_that_does_not_fit_is_refused_unchanged(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model(), 2)
    other = model(width=2, steps=0)
    before = arrays(other)["weights"]
    with pytest.raises(UserError, match=r"of shape \(8, 3\), in the model \(8, 2\)"):
        checkpoint.restore(other, tmp_path)
    for name, value in arrays(other)["weights"].items():
        np.testing.assert_array_equal(value, before[name])


def test_no_checkpoint_is_an_error_with_a_remedy(tmp_path):
    assert checkpoint.find(tmp_path / "none") is None
    with pytest.raises(UserError, match="holds no checkpoint\n  train first"):
        checkpoint.restore(model(steps=0), tmp_path)


def test_without_room_it_says_so_at_once(tmp_path, monkeypatch):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model(), 1)
        checkpoints.wait()
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
            with pytest.raises(OSError, match="No space left") as caught:
                checkpoints.save(model(), 2)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_room_that_ends_while_it_is_written_is_the_same_error(tmp_path):
    def result():
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 25 bytes to file 7: No space left on device")

    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints._pending = SimpleNamespace(result=result)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()


KILLED = """
import os, signal, sys, keras, numpy as np
sys.path.insert(0, sys.argv[2])
from test_checkpoint import model
from keras_gemma_ft import checkpoint
trained = model()
checkpoints = checkpoint.Checkpoints(sys.argv[1])
checkpoints.save(trained, 1)
checkpoints.wait()
if sys.argv[3] == "renaming":  # the very last moment: all is written, only the name is missing
    real = os.rename
    def rename(source, target, *args, **kwargs):
        if str(target).endswith("/2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(source, target, *args, **kwargs)
    os.rename = rename
checkpoints.save(trained, 2)
if sys.argv[3] == "at once":
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.wait()
"""


@pytest.mark.parametrize("moment", [pytest.param("at once", marks=pytest.mark.heavy), "renaming"])
def test_a_run_killed_while_saving_leaves_the_checkpoint_before(moment, tmp_path):
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), here, moment],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    saved = checkpoint.find(tmp_path)
    assert saved.step == 1 or (moment == "at once" and saved.step == 2)
    checkpoint.restore(model(steps=0), tmp_path, resume=True)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:  # what the killed save left is cleared away
        checkpoints.save(model(), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
