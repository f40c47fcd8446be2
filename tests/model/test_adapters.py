"""Adapters in the decoder: nothing at the start, dropout as it should be, targets by role."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FLOAT32, Decoder, distance, gradients, logits, random_adapters, tokens
from small_models import KINDS

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import gemma4, lora
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.weights import ALL_LINEAR, EXPERTS, lora_targets, table

KEY = jnp.array([1, 2], jnp.uint32)


@pytest.mark.parametrize("kind", ["e2b", "26b_a4b"])
def test_a_new_adapter_changes_nothing(decoder, kind):
    new = {weight.name: lora.initial(weight, 4, seed=0) for weight in lora_targets(decoder(kind).config)}
    base = logits(decoder(kind), tokens())
    np.testing.assert_array_equal(logits(decoder(kind), tokens(), adapters=new), base)
    trained = random_adapters(decoder(kind).config)
    assert np.abs(logits(decoder(kind), tokens(), adapters=trained) - base).max() > 0.1


RATE = 0.3
SETTINGS = dataclasses.replace(FLOAT32, lora_dropout=RATE)


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.grad, argnums=3)
def _gradient_of_one_token(config, settings, params, adapters, key):
    one = jnp.ones((1, 1), jnp.int32)
    hidden = gemma4.hidden_states(
        params, config, one, 0 * one, one, settings=settings, adapters=adapters, dropout_key=key
    )
    return jnp.sum(gemma4.logits(params, config, hidden)[0, 0, :5])


def adapters_that_weigh(share: float, decoder: Decoder) -> Any:
    return {
        name: {"lora_a": factors["lora_a"], "lora_b": share * factors["lora_b"]}
        for name, factors in random_adapters(decoder.config).items()
    }


def input_masks(decoder: Decoder, key: Any) -> dict[str, dict[int, np.ndarray]]:
    """What each adapter's input was multiplied by, [in], by role and layer.

    For a single token the gradient of A is a column times the adapter's input: its zeros were dropped.
    """
    # So light that dropping their inputs moves nothing else.
    adapters = adapters_that_weigh(1e-5, decoder)
    arguments = decoder.config, SETTINGS, decoder.params, adapters
    dropped, whole = _gradient_of_one_token(*arguments, key), _gradient_of_one_token(*arguments, None)
    masks: dict[str, dict[int, np.ndarray]] = {}
    for name, weight in table(decoder.config).items():
        # One token attends to itself alone: its queries and keys have no gradient.
        if name in adapters and weight.role not in ("q_proj", "k_proj"):
            for index in np.ndindex(weight.layers.shape):
                found, full = (np.asarray(g[name]["lora_a"][index]) for g in (dropped, whole))
                mask = (found * full).sum(axis=0) / (full * full).sum(axis=0)
                np.testing.assert_allclose(found, full * mask, atol=1e-2 * np.abs(full).max())
                masks.setdefault(weight.role, {})[int(weight.layers[index])] = mask
    return masks


@pytest.fixture(scope="module")
def masks(decoder):
    return input_masks(decoder("31b"), KEY)


def test_dropout_drops_its_share_and_scales_the_rest(masks):
    values = np.concatenate([mask for by_layer in masks.values() for mask in by_layer.values()])
    dropped = values == 0
    np.testing.assert_allclose(values[~dropped], 1 / (1 - RATE), rtol=1e-2)
    deviation = (RATE * (1 - RATE) / values.size) ** 0.5
    assert values.size > 1000 and abs(dropped.mean() - RATE) < 4 * deviation


def test_projections_of_one_input_share_its_mask(masks):
    for layer, mask in masks["gate_proj"].items():
        np.testing.assert_array_equal(mask == 0, masks["up_proj"][layer] == 0)


def test_every_layer_and_every_input_has_a_mask_of_its_own(masks):
    inputs = [
        mask for role in ("v_proj", "o_proj", "gate_proj", "down_proj") for mask in masks[role].values()
    ]
    different = [tuple(mask[:32] == 0) for mask in inputs]  # all that the narrowest have
    assert min(mask.size for mask in inputs) == 32
    # Six layers, of which the two global ones have no v.
    assert len(different) == 3 * 6 + 4 and len(set(different)) == 22


def test_the_key_decides(decoder, masks):
    other = input_masks(decoder("31b"), KEY + 1)
    again = input_masks(decoder("31b"), KEY)
    for role, by_layer in masks.items():
        for layer, mask in by_layer.items():
            np.testing.assert_array_equal(again[role][layer], mask)
            assert (other[role][layer] == 0).tolist() != (mask == 0).tolist()


def test_the_backward_pass_drops_what_the_forward_pass_did(decoder):
    """With adapters that weigh, a mask made anew must be the one of the forward pass."""
    model = decoder("31b")
    adapters = adapters_that_weigh(1.0, model)
    kept, again = (
        _gradient_of_one_token(
            model.config, dataclasses.replace(SETTINGS, remat=remat), model.params, adapters, KEY
        )
        for remat in ("none", "full")
    )
    for name, factors in kept.items():
        for factor, gradient in factors.items():
            if name.rpartition("/")[2] not in ("q_proj", "k_proj"):
                assert distance(again[name][factor], gradient) < 1e-5, (name, factor)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_the_seven_projections(kind):
    config = Gemma4Config.from_hf(KINDS[kind])
    found: dict[str, set[str]] = {"own/local": set(), "own/global": set(), "shared/local": set()}
    for weight in lora_targets(config):
        place, _, role = weight.name.rpartition("/")
        found.setdefault(place, set()).add(role)
    seven, shared = set(ALL_LINEAR), config.num_kv_shared_layers > 0
    assert found["own/local"] == seven
    assert found["own/global"] == (seven - {"v_proj"} if config.attention_k_eq_v else seven)
    assert found["shared/local"] == (seven - {"k_proj", "v_proj"} if shared else set())


def test_targets_by_role():
    config = Gemma4Config.from_hf(KINDS["e4b"])
    chosen = {weight.role for weight in lora_targets(config, "q_proj, per_layer_input_gate")}
    assert chosen == {"q_proj", "per_layer_input_gate"}
    assert {weight.role for weight in lora_targets(config, "all-linear, per_layer_projection")} == {
        *ALL_LINEAR,
        "per_layer_projection",
    }
    with pytest.raises(UserError, match="'experts_down' is no matrix of this decoder's layers"):
        lora_targets(config, "all-linear,experts_down")
    with pytest.raises(UserError, match="'router_proj' is no matrix of this decoder's layers"):
        lora_targets(config, ("q_proj", "router_proj"))


def test_a_new_adapter_is_as_peft_makes_it():
    weight = next(
        weight for weight in lora_targets(Gemma4Config.from_hf(KINDS["e4b"])) if weight.role == "down_proj"
    )
    made = lora.initial(weight, 16, seed=0)
    bound = weight.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
    assert 0.95 * bound < np.abs(made["lora_a"]).max() <= bound
    assert abs(made["lora_a"].std() / (bound / 3**0.5) - 1) < 0.05
    assert not made["lora_b"].any()
    np.testing.assert_array_equal(lora.initial(weight, 16, seed=0)["lora_a"], made["lora_a"])
    assert (lora.initial(weight, 16, seed=1)["lora_a"] != made["lora_a"]).all()


WITH_EXPERTS = "all-linear,experts_gate_up,experts_down"


def test_experts_have_adapters_where_they_are_asked_for():
    config = Gemma4Config.from_hf(KINDS["26b_a4b"])
    chosen = {weight.name: weight for weight in lora_targets(config, WITH_EXPERTS)}
    assert {name.rpartition("/")[2] for name in chosen} == {*ALL_LINEAR, *EXPERTS}
    made = lora.initial(chosen["own/local/experts_gate_up"], 3, seed=0)
    layers = chosen["own/local/experts_gate_up"].layers.shape
    assert made["lora_a"].shape == (*layers, config.num_experts, 3, config.hidden_size)
    assert made["lora_b"].shape == (*layers, config.num_experts, 2 * config.moe_intermediate_size, 3)
    assert 0.9 * config.hidden_size**-0.5 < made["lora_a"].max() <= config.hidden_size**-0.5


@pytest.mark.heavy
def test_adapters_of_experts_are_those_of_merged_weights(decoder):
    """Values, and gradients by the chain rule: of W + s · B A, A has s · Bᵀ dW and B has s · dW Aᵀ."""
    model, scale = decoder("26b_a4b"), 2.0
    settings = dataclasses.replace(FLOAT32, lora_scale=scale)
    adapters = random_adapters(model.config, targets=WITH_EXPERTS)
    merged = {
        name: model.params[name] + scale * factors["lora_b"] @ factors["lora_a"]
        for name, factors in adapters.items()
    }
    mask = np.random.default_rng(1).random(tokens().shape) < 0.5
    _, expected, gradient_of = gradients(
        dataclasses.replace(model, params=model.params | merged), mask, tokens()
    )
    _, found, gradient = gradients(
        model, mask, tokens(), settings=settings, adapters=adapters, train_base=False
    )
    assert distance(found, expected) < 1e-5
    for name, factors in adapters.items():
        a, b, d_weight = factors["lora_a"], factors["lora_b"], gradient_of["params"][name]
        by_rule = {
            "lora_a": scale * b.swapaxes(-1, -2) @ d_weight,
            "lora_b": scale * d_weight @ a.swapaxes(-1, -2),
        }
        for factor, value in by_rule.items():
            assert distance(gradient["adapters"][name][factor], value) < 1e-3, (name, factor)


def test_gradients_are_squared_layer_by_layer():
    model = GemmaCausalLM(Gemma4Config.from_hf(KINDS["26b_a4b"]), dtype="float32")
    model.enable_lora(2, targets="all-linear,experts_down")
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=variable.shape).astype(np.float32) for variable in model.trainable_variables]
    layers = {weight.name: weight.layers for weight in lora_targets(model.config, model.lora.targets)}
    found = model._squared_by_layer(list(map(jnp.asarray, gradients)))
    assert len(found) == 2 * len(layers)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        stack = layers[variable.path.partition("/")[2].rpartition("/")[0]]
        expected = [np.sum(np.square(gradient[index])) for index in np.ndindex(stack.shape)]
        np.testing.assert_allclose(np.ravel(found[variable.path]), expected, rtol=1e-5)
        assert found[variable.path].shape == stack.shape


def test_nothing_of_a_masks_size_is_carried_through_the_loop_over_layers(decoder):
    one = decoder("31b")
    adapters = random_adapters(one.config)
    rows = [jnp.ones((2, 24), jnp.int32)] * 3

    def total(adapters, params, key):
        given = {"settings": SETTINGS, "adapters": adapters, "dropout_key": key}
        return gemma4.hidden_states(params, one.config, *rows, **given).sum()

    program = jax.jit(jax.grad(total)).lower(adapters, one.params, KEY).compile()
    carried = re.findall(r"\((.*?)\) while\(", program.as_text())
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"u32\[([\d,]+)\]", str(carried))}
    assert carried and sizes and max(sizes) < 24 * one.config.hidden_size
