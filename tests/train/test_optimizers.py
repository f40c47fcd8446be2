"""optax inside Keras: the same numbers as optax alone, state by name, and the schedule by hand."""

import math

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.train.optimizers import AdamW, PlanSchedule, WarmupThenDecay, adamw


def variables(dtype="float32"):
    random = np.random.default_rng(0)
    return [
        keras.Variable(random.normal(size=(4, 3)), dtype=dtype, name="kernel"),
        keras.Variable(random.normal(size=(3,)), dtype=dtype, name="norm_scale"),
    ]


def gradients(step):
    random = np.random.default_rng(step + 1)
    return [jnp.asarray(random.normal(size=shape) * 3, jnp.float32) for shape in ((4, 3), (3,))]


@pytest.mark.parametrize(("clip", "decay"), [(1.0, 0.0), (None, 0.1), (0.5, 0.01)])
def test_updates_are_those_of_optax_alone(clip, decay):
    ours, steps = variables(), 6
    optimizer = adamw(1e-2, total_steps=steps, clip_norm=clip, weight_decay=decay)
    optimizer.build(ours)
    rates = [optimizer.learning_rate_at(step) for step in range(steps)]
    reference = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            lambda count: jnp.asarray(rates)[count], weight_decay=decay, mask={"kernel": True, "norm": False}
        ),
    )
    weights = dict(zip(("kernel", "norm"), (jnp.array(v.value) for v in ours), strict=True))
    state = reference.init(weights)

    @jax.jit
    def update(trainable, rest, grads):
        return optimizer.stateless_apply(rest, grads, trainable)

    trainable, rest = [v.value for v in ours], [v.value for v in optimizer.variables]
    for step in range(steps):
        grads = gradients(step)
        trainable, rest = update(trainable, rest, grads)
        changes, state = reference.update(dict(zip(("kernel", "norm"), grads, strict=True)), state, weights)
        weights = optax.apply_updates(weights, changes)
    for value, expected in zip(trainable, weights.values(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-7)
    assert not np.allclose(trainable[0], variables()[0].value)


def test_the_state_is_found_by_name():
    optimizer = adamw(total_steps=10)
    optimizer.build(variables())
    names = {variable.path: variable.shape for variable in optimizer.variables}
    assert names["adamw/adam.mu.kernel"] == (4, 3)
    assert names["adamw/adam.nu.norm_scale"] == (3,)
    assert {"adamw/iteration", "adamw/total_steps", "adamw/adam.count"} <= names.keys()
    assert len(names) == 7


def test_moments_are_float32_where_weights_are_bfloat16():
    ours = variables("bfloat16")
    optimizer = adamw(1e-2, total_steps=2)
    optimizer.apply([gradient.astype(jnp.bfloat16) for gradient in gradients(0)], ours)
    assert all(str(variable.dtype) != "bfloat16" for variable in optimizer.variables)
    assert ours[0].dtype == "bfloat16"


def test_the_schedule_by_hand():
    rate = WarmupThenDecay(1.0, "cosine", 0.2)
    expected = [1 / 3, 2 / 3] + [(1 + math.cos(math.pi * p / 8)) / 2 for p in range(8)]
    np.testing.assert_allclose([rate(step, 10) for step in range(10)], expected, rtol=1e-6)
    linear = WarmupThenDecay(1.0, "linear", 0.2)
    np.testing.assert_allclose([linear(step, 10) for step in range(2, 10)], [1 - p / 8 for p in range(8)])
    assert [float(WarmupThenDecay(0.5, "constant", 0.0)(step, 10)) for step in (0, 9, 50)] == [0.5] * 3


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_traced_rate_is_the_hosts(kind):
    rate = WarmupThenDecay(2e-4, kind, 0.1)
    traced = jax.jit(lambda step, total: rate(step, total, jnp))
    for step in range(40):
        assert float(traced(step, 40)) == pytest.approx(float(rate(step, 40)), rel=1e-5, abs=1e-11)
        assert rate(step, 40) > 0


def test_without_a_length_it_says_so_and_fit_can_tell_it():
    optimizer = adamw(1e-2)
    with pytest.raises(UserError, match="length of the learning-rate schedule"):
        optimizer.apply(gradients(0), variables())
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=adamw(1e-2), loss="mse")
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    model.fit(x, x.sum(1), epochs=3, batch_size=8, verbose=0, callbacks=[PlanSchedule()])
    assert int(model.optimizer.iterations) == 12
    assert model.optimizer.learning_rate_at(11) < 0.03 * 1e-2
    assert float(model.optimizer.learning_rate) < model.optimizer.learning_rate_at(11)


def test_it_is_rebuilt_from_its_config():
    optimizer = adamw(3e-4, "linear", 0.05, 77, 0.5, 0.01)
    again = AdamW.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert again.learning_rate_at(40) == optimizer.learning_rate_at(40)
