"""Gradients in float32: as PEFT and transformers compute them, and the same in every way to compute them."""

import dataclasses
import functools
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversations import apart, conversations, packed, unpacked
from decoders import FLOAT32, VOCABULARY, distance, gradients, random_adapters, tokens
from programs import depends_on, equations
from small_models import KINDS

from keras_gemma_ft.model import gemma4, projections
from keras_gemma_ft.model.weights import ALL_LINEAR, table

RANK, ALPHA = 4, 8.0
TOLERANCE = 1e-3
SETTINGS = dataclasses.replace(FLOAT32, lora_scale=ALPHA / RANK)


def loss_mask() -> np.ndarray:
    return np.random.default_rng(1).random(tokens().shape) < 0.5


@pytest.fixture(scope="session")
def ours(decoder):
    """Gives a kind's losses, logits and gradients of all weights and adapters."""

    @functools.cache
    def compute(kind: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        adapters = random_adapters(decoder(kind).config, RANK)
        return gradients(decoder(kind), loss_mask(), tokens(), settings=SETTINGS, adapters=adapters)

    return compute


@pytest.fixture(scope="session")
def theirs(decoder, torch_model):
    """Gives a kind's logits and its gradients by PEFT's names, of the base as well."""
    import peft
    import torch

    @functools.cache
    def compute(kind: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        config = decoder(kind).config
        settings = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(ALL_LINEAR), lora_dropout=0.0
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's own
            model = peft.get_peft_model(torch_model(kind), settings)
        given = peft_parts(config, random_adapters(config, RANK))
        found = {name for name, _ in model.named_parameters() if "lora_" in name}
        assert found == set(given)
        leaves = dict(model.named_parameters())
        leaves |= {name: value for name, value in model.named_buffers() if name.endswith("layer_scalar")}
        with torch.no_grad():
            for name, value in given.items():
                leaves[name].copy_(torch.from_numpy(value))
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        rows, mask = torch.from_numpy(tokens()).long(), torch.from_numpy(loss_mask())[:, 1:]
        logits = model(rows).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1), reduction="none"
        )
        losses[mask.reshape(-1)].sum().backward()
        grads = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
        return logits.detach().numpy(), grads

    return compute


def peft_parts(config: Any, adapters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Adapters, or their gradients, layer by layer by PEFT's names in a live model."""
    parts = {}
    for name, factors in adapters.items():
        for factor, value in factors.items():
            for index, peft_name in table(config)[name].peft_names(factor):
                parts[peft_name.removesuffix(".weight") + ".default.weight"] = value[index]
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_logits_with_adapters_equal_peft(ours, theirs, kind):
    assert distance(ours(kind)[1], theirs(kind)[0]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_lora_gradients_equal_peft(decoder, ours, theirs, kind):
    expected = theirs(kind)[1]
    for name, gradient in peft_parts(decoder(kind).config, ours(kind)[2]["adapters"]).items():
        assert distance(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("kind", KINDS)
def test_base_gradients_equal_transformers(decoder, ours, theirs, kind):
    """Every weight's, the router's, the experts' and the tied embedding's among them."""
    expected = theirs(kind)[1]
    compared = set()
    # The last layer's scalar is divided out by the norm after it; what is left of its gradient is rounding.
    last = decoder(kind).config.num_hidden_layers - 1
    scalar = expected[f"base_model.model.model.layers.{last}.layer_scalar"]
    assert abs(scalar) < 1e-3
    for weight in table(decoder(kind).config).values():
        gradient = ours(kind)[2]["params"][weight.name]
        for index, name in weight.hf_names():
            name = f"base_model.model.model.{name}"
            wrapped = f"{name.removesuffix('.weight')}.base_layer.weight"
            name = wrapped if wrapped in expected else name
            compared.add(name)
            if expected[name] is scalar:
                assert abs(gradient[index]) < 1e-3
            else:
                assert distance(gradient[index], expected[name]) < TOLERANCE, name
    assert compared == {name for name in expected if "lora_" not in name} - {
        "base_model.model.lm_head.weight"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_targeted_module_gets_gradient(ours, kind):
    for name, factors in ours(kind)[2]["adapters"].items():
        for factor, gradient in factors.items():
            layers = gradient.reshape(-1, gradient.shape[-2] * gradient.shape[-1])
            assert (np.abs(layers).max(axis=1) > 1e-4).all(), (name, factor)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_have_the_losses_and_gradients_of_their_examples(decoder, kind):
    adapters = random_adapters(decoder(kind).config)
    rows = conversations(seed=5)
    mask, *together = packed(rows, padding_id=7)
    losses, _, expected = gradients(decoder(kind), mask, *together, settings=SETTINGS, adapters=adapters)
    batches, alone = apart(rows), []
    total = jax.tree.map(np.zeros_like, expected)
    for batch in batches:
        mask, *one_each = packed(batch, padding_id=0)
        found, _, gradient = gradients(decoder(kind), mask, *one_each, settings=SETTINGS, adapters=adapters)
        alone.append(found)
        total = jax.tree.map(np.add, total, gradient)
    assert (losses > 0).sum() > 20
    assert distance(losses[together[2] > 0], unpacked(batches, alone, rows)) < 1e-5
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, gradient), found in zip(paths, jax.tree.leaves(total), strict=True):
        # The last layer's scalar is divided out by the norm after it: its gradient is nothing but rounding.
        assert distance(found, gradient, least=1e-2) < 1e-3, path


@pytest.fixture(scope="session")
def adapter_gradients(decoder):
    """Gives the adapters' gradients of the kind with everything, computed in one way or another."""

    @functools.cache
    def compute(**settings: Any) -> dict[str, Any]:
        adapters = random_adapters(decoder("e2b").config, RANK)
        return gradients(
            decoder("e2b"),
            loss_mask(),
            tokens(),
            settings=dataclasses.replace(SETTINGS, **settings),
            adapters=adapters,
            train_base=False,
        )[2]["adapters"]

    return compute


heavy = pytest.mark.heavy


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"remat": "none"}, id="none"),
        pytest.param({"remat": "matmuls", "unroll": True}, id="matmuls unrolled"),
        pytest.param({"remat": "down"}, id="down", marks=heavy),
        pytest.param({"remat": "sublayers"}, id="sublayers", marks=heavy),
        pytest.param({"remat": "outputs"}, id="outputs", marks=heavy),
        pytest.param({"remat": "feed_forward"}, id="feed_forward", marks=heavy),
        pytest.param({"remat": "attention"}, id="attention", marks=heavy),
        pytest.param({"remat": "matmuls"}, id="matmuls", marks=heavy),
        pytest.param({"remat": "offload"}, id="offload", marks=heavy),
        pytest.param({"unroll": True}, id="full unrolled", marks=heavy),
    ],
)
def test_every_way_to_compute_gradients_gives_the_same(ours, adapter_gradients, way):
    expected = ours("e2b")[2]["adapters"]
    found = adapter_gradients(**way)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, factors in expected.items():
        for factor, gradient in factors.items():
            assert distance(found[name][factor], gradient) < 1e-5, (name, factor)


def test_each_policy_computes_less_again_than_the_one_before(decoder):
    """Gradients are the same under every policy, also where its names are misspelt and it keeps nothing."""
    given, ids = decoder("e2b"), jnp.ones((2, 24), jnp.int32)
    adapters = random_adapters(given.config, RANK)

    def gradient(remat: str) -> str:
        settings = dataclasses.replace(SETTINGS, remat=remat, implementation="xla")

        def total(adapters: Any) -> jax.Array:
            return gemma4.hidden_states(
                given.params, given.config, ids, ids, ids, settings=settings, adapters=adapters
            ).sum()

        return str(jax.make_jaxpr(jax.grad(total))(adapters))

    ladder = ["full", "down", "outputs", "feed_forward", "matmuls", "none"]
    for policies in (ladder, ["full", "attention", "outputs"], ["down", "sublayers", "feed_forward"]):
        programs = [gradient(remat) for remat in policies]
        counts = [program.count("dot_general[") for program in programs]
        assert all(more > fewer for more, fewer in itertools.pairwise(counts)), (policies, counts)
        for name in {name for remat in policies for name in gemma4._NAMES.get(remat, ())}:
            assert f"name[name={name}]" in programs[0], name


def test_an_inputs_gradient_waits_for_those_of_its_adapters():
    """XLA would put them off, and keep until then what they are computed from."""

    def total(x: jax.Array, factors: Any) -> jax.Array:
        x, factors = projections._gradients_at_once(x, factors)
        return (x @ factors["q_proj"]["lora_a"].T).sum()

    x, factors = jnp.ones((5, 8)), {"q_proj": {"lora_a": jnp.ones((3, 8))}}
    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(x, factors).jaxpr
    products = [e.outvars[0] for e in program.eqns if e.primitive.name == "dot_general"]
    (of_factor,) = (value for value in products if value.aval.shape in ((8, 3), (3, 8)))
    assert depends_on(program.outvars[0], {of_factor}, program.eqns)


def test_the_gradients_of_all_adapters_are_waited_for(decoder):
    given, ids = decoder("e2b"), jnp.ones((2, 24), jnp.int32)
    adapters = random_adapters(given.config, RANK)

    def total(adapters: Any) -> jax.Array:
        return gemma4.hidden_states(
            given.params, given.config, ids, ids, ids, settings=SETTINGS, adapters=adapters
        ).sum()

    program = equations(jax.make_jaxpr(jax.grad(total))(adapters).jaxpr)
    barriers = [equation for equation in program if equation.primitive.name == "optimization_barrier"]
    waited_for = {value.aval.shape for equation in barriers for value in equation.invars}
    for name, factors in adapters.items():
        for factor, stack in factors.items():
            assert stack.shape[-2:] in waited_for, (name, factor)
