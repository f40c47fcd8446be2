"""The audit of the first step, on gradient trees written out by hand and in `fit` of a small Keras model."""

import math

import numpy as np
import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.lora import weight_name
from keras_gemma_ft.train.audit import Gradient, audit, module_of, require_learning


def tree(q=1.0, v=1.0, layers=False):
    """An adapter at step 0 in three layers of eight numbers: B is zero, therefore A has no gradient."""
    values = {"q_proj/lora_a": 0.0, "q_proj/lora_b": q, "v_proj/lora_a": 0.0, "v_proj/lora_b": v}
    made = {f"local/{name}": np.full((3, 8), value) for name, value in values.items()}
    return {
        path: Gradient(np.square(value).sum(1), 24) if layers else Gradient.of(value)
        for path, value in made.items()
    }


def test_norms_by_group():
    updates = {path: np.full((3, 8), 0.1) for path in tree()}
    audited = audit(2.5, 7, tree(q=2.0), updates=updates)
    query, value = audited.groups
    assert (query.name, query.parameters, query.gradient_norm) == ("local/q_proj", 48, 2 * math.sqrt(24))
    assert value.gradient_norm == pytest.approx(math.sqrt(24))
    assert query.update_norm == pytest.approx(0.1 * math.sqrt(48))
    require_learning(audited, ["q_proj", "v_proj"])
    record = audited.to_json()["audit"]
    assert record["supervised_tokens"] == 7
    assert [group["name"] for group in record["groups"]] == ["local/q_proj", "local/v_proj"]


def test_norms_do_not_overflow_in_half_precision():
    gradients = {"m/w": Gradient.of(np.full(1000, 6e4, np.float16))}
    assert audit(1.0, 1, gradients).groups[0].gradient_norm == pytest.approx(6e4 * math.sqrt(1000), rel=1e-3)


def test_a_group_without_gradient_is_named():
    with pytest.raises(UserError, match=r"local/v_proj is to be trained but receives no gradient at step 1"):
        require_learning(audit(1.0, 7, tree(v=0.0)))
    require_learning(audit(1.0, 7, tree(v=0.0)), ["q_proj"])  # v_proj is no target


def test_one_dead_layer_among_living_ones_is_named():
    gradients = tree(layers=True)
    require_learning(audit(1.0, 7, gradients))  # A alone is silent, not its layer
    gradients["local/v_proj/lora_b"].squared[1] = 0
    with pytest.raises(UserError, match=r"local/v_proj .* no gradient in layers 1 at step 1"):
        require_learning(audit(1.0, 7, gradients))


def test_a_target_that_the_model_does_not_have_is_named():
    with pytest.raises(UserError, match="target 'gate_proj' has no trainable variable"):
        require_learning(audit(1.0, 7, tree()), ["q_proj", "gate_proj"])


@pytest.mark.parametrize(
    ("loss", "tokens", "gradient", "message"),
    [
        (1.0, 0, 1.0, "no token of the first batch is supervised"),
        (math.nan, 7, 1.0, "loss of the first batch is nan"),
        (math.inf, 7, 1.0, "loss of the first batch is inf"),
        (1.0, 7, math.nan, "gradient of local/q_proj is nan"),
    ],
)
def test_what_cannot_learn_is_refused(loss, tokens, gradient, message):
    with pytest.raises(UserError, match=message):
        require_learning(audit(loss, tokens, tree(q=gradient)))


def test_groups_are_modules():
    assert module_of("decoder/local/q_proj/lora_a") == "decoder/local/q_proj"
    assert module_of("kernel") == "kernel"
    assert weight_name("gemma/own/local/q_proj/lora_a") == "own/local/q_proj"
    assert weight_name("gemma/own/local/q_proj") == "own/local/q_proj"
    assert weight_name("gemma/norm") == "norm"


def keras_array(variable):
    return np.array(variable.value)


@pytest.fixture
def regression():
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, name="one"), keras.layers.Dense(1, name="two")]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    return model, x, x.sum(1, keepdims=True)


def test_in_fit_the_updates_of_plain_gradient_descent_are_its_gradients(regression):
    from keras_gemma_ft.train.callbacks import LearningAudit

    model, x, y = regression
    reports = []
    watch = LearningAudit((x[:8], y[:8]), report=reports.append)
    before = [keras_array(value) for value in model.trainable_variables]
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[watch])
    assert reports == [watch.result]
    assert [group.name.split("/")[-1] for group in watch.result.groups] == ["one", "two"]
    for group in watch.result.groups:
        assert group.update_norm == pytest.approx(0.01 * group.gradient_norm, rel=1e-4)
    assert any(
        not np.allclose(old, keras_array(new))
        for old, new in zip(before, model.trainable_variables, strict=True)
    )


def test_in_fit_a_loss_that_stops_being_finite_stops_the_run(regression):
    from keras_gemma_ft.train.callbacks import LearningAudit

    model, x, y = regression
    y[20] = np.nan
    with pytest.raises(UserError, match="the loss is nan at step 3"):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[LearningAudit((x[:8], y[:8]))])


def test_in_fit_nothing_is_trained_when_the_first_step_is_refused(regression):
    from keras_gemma_ft.train.callbacks import LearningAudit

    model, x, _ = regression
    before = [keras_array(value) for value in model.trainable_variables]
    model.trainable_variables[-2].assign(np.zeros((8, 1)))  # behind it, the first layer gets no gradient
    dead = LearningAudit((x, x.sum(1, keepdims=True)))
    with pytest.raises(UserError, match="one is to be trained but receives no gradient"):
        model.fit(x, x.sum(1, keepdims=True), verbose=0, callbacks=[dead])
    np.testing.assert_array_equal(before[0], keras_array(model.trainable_variables[0]))
