"""`train.remat=auto` takes the fastest policy that fits, and `fit` does not compile its step again."""

from typing import get_args

import jax
import keras
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_models import KINDS

from keras_gemma_ft.config import BY_NAME
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import gemma4
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.train import remat_choice
from keras_gemma_ft.train.optimizers import adamw

ROWS, LENGTH = 4, 64
BATCH = {
    "token_ids": np.ones((ROWS, LENGTH), np.int32),
    "positions": np.zeros((ROWS, LENGTH), np.int32),
    "segment_ids": np.ones((ROWS, LENGTH), np.int32),
    "loss_mask": np.ones((ROWS, LENGTH), bool),
}


class OneBatch(keras.utils.PyDataset):
    num_batches = 1

    def __getitem__(self, index):
        return BATCH


def build() -> GemmaCausalLM:
    model = GemmaCausalLM(Gemma4Config.from_hf(KINDS["31b"]), dtype="float32")
    model.enable_lora(2)
    model.compile(optimizer=adamw(total_steps=2))
    return model


@pytest.fixture
def sizes(monkeypatch):
    """Lets each policy's step need so many GiB, in place of compiling it."""

    def let(**gib):
        of = {remat: None if size is None else int(size * 2**30) for remat, size in gib.items()}
        monkeypatch.setattr(remat_choice, "step_bytes", lambda model, batch: of[model.settings.remat])

    return let


GIB = 2**30
NEEDS = {"none": 80, "matmuls": 44, "feed_forward": 43.5, "outputs": 33, "sublayers": 32.5, "down": 31}
NEEDS |= {"attention": 30, "full": 20, "offload": 9.5}


def test_every_policy_can_be_configured_and_is_tried():
    policies = set(get_args(gemma4.Remat))
    assert set(remat_choice.LADDER) == policies
    assert set(BY_NAME["train.remat"].choices) == policies | {"auto"}


@pytest.mark.parametrize(
    ("limit", "taken"),
    [
        (90, "none"),
        (45, "matmuls"),
        (44, "matmuls"),
        (43.6, "feed_forward"),
        (43, "outputs"),
        (32.5, "sublayers"),
        (32, "down"),
        (30, "attention"),
        (10, "offload"),
    ],
)
def test_the_fastest_that_fits(sizes, limit, taken):
    sizes(**NEEDS)
    model = build()
    choice = remat_choice.choose_remat(model, BATCH, limit=limit * GIB)
    assert choice.remat == model.settings.remat == taken
    assert tuple(choice.needs) == remat_choice.LADDER[: remat_choice.LADDER.index(taken) + 1]


def test_it_says_why(sizes):
    sizes(none=None, matmuls=44.1, feed_forward=43, outputs=40.5, sublayers=40.4, down=40.25, attention=30.25)
    choice = remat_choice.choose_remat(build(), BATCH, limit=40 * GIB)
    assert str(choice) == (
        "remat: attention; of 40.00 GiB attention needs 30.25 GiB, none does not compile, "
        "matmuls needs 44.10 GiB, feed_forward needs 43.00 GiB, outputs needs 40.50 GiB, "
        "sublayers needs 40.40 GiB, down needs 40.25 GiB"
    )


@pytest.mark.parametrize(("method", "remedy"), [("lora", "method=qlora"), ("qlora", "embedding=int8")])
def test_nothing_fits(sizes, method, remedy):
    sizes(**NEEDS)
    model = build()
    model.micro_batch_size = 2
    message = r"train.remat: .* at least 9.50 GiB, and 8.00 GiB .*\n.*micro_batch_size below 2, .*" + remedy
    with pytest.raises(UserError, match=message):
        remat_choice.choose_remat(model, BATCH, limit=8 * GIB, method=method)


def test_a_device_that_reports_no_limit_keeps_all():
    assert remat_choice.device_limit() is None
    model = build()
    choice = remat_choice.choose_remat(model, BATCH)
    assert choice.remat == model.settings.remat == "none"
    assert "reports no limit" in str(choice)


@pytest.fixture
def cache(tmp_path):
    """A new directory of compiled programs, in which all are kept."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_device_without_offloading_has_one_policy_less(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such memory")

    model = build()
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    remat_choice.set_remat(model, "offload")
    assert remat_choice.step_bytes(model, BATCH) is None
    remat_choice.set_remat(model, "full")
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such memory"):
        remat_choice.step_bytes(model, BATCH)


def test_steps_are_compiled_and_measured_and_fit_finds_the_one_taken(cache, monkeypatch):
    monkeypatch.setattr(remat_choice, "LADDER", ("none", "full"))
    programs = lambda: {path.name for path in cache.glob("jit_train_step-*-cache")}  # noqa: E731
    model = build()
    remat_choice.set_remat(model, "none")
    most = remat_choice.step_bytes(model, BATCH)
    choice = remat_choice.choose_remat(model, BATCH, limit=most - 1)
    assert choice.remat == "full"
    assert choice.needs["none"] == most
    assert sum(variable.value.nbytes for variable in model.variables) < choice.needs["full"] < 0.9 * most
    kept = programs()
    assert len(kept) == 2
    model.fit(OneBatch(), shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 1
    assert programs() == kept
