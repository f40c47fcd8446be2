"""A model whose per-layer embedding lies in the host's memory is the same model."""

import jax.numpy as jnp
import keras
import numpy as np
import pytest
from small_models import GLOBAL, KINDS, LOCAL

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.generation import generate_tokens
from keras_gemma_ft.ops import host
from keras_gemma_ft.train.optimizers import adamw

HOST = {"per_layer_embedding": "host"}
TABLE = "embed_tokens_per_layer"
TWO_LAYERS = {"layer_types": [LOCAL, GLOBAL], "num_hidden_layers": 2, "num_kv_shared_layers": 0}


def build(quantization=None):
    config = Gemma4Config.from_hf({**KINDS["e4b"], **TWO_LAYERS})
    model = GemmaCausalLM(config, dtype="float32", quantization=quantization)
    model.enable_lora(2, dropout=0.1, targets="q_proj,down_proj")
    return model


def batch():
    ids = np.random.default_rng(0).integers(3, 96, (2, 24)).astype(np.int32)
    return {"token_ids": ids, "loss_mask": np.ones(ids.shape, bool)}


@pytest.fixture(scope="module")
def trained():
    models = {}
    for name, quantization in (("device", None), ("host", HOST)):
        model = models[name] = build(quantization)
        adam = adamw(1e-2, schedule="constant", warmup_ratio=0.0)
        model.compile(optimizer=adam, micro_batch_size=1, settings={"remat": "none"})
        losses = model.fit(batch(), batch_size=2, epochs=3, shuffle=False, verbose=0).history["loss"]
        models[name] = model, *losses
    return models


def test_training_is_the_same(trained):
    (there, *losses), (here, *expected) = trained["host"], trained["device"]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for name, factors in here.adapters().items():
        for factor, value in factors.items():
            np.testing.assert_allclose(there.adapters()[name][factor], value, atol=1e-6)


def test_the_table_stays_on_the_host(trained):
    model = trained["host"][0]
    assert [name for name, value in model.params().items() if host.holds(jnp.asarray(value))] == [TABLE]


@pytest.mark.heavy
def test_generation_is_the_same(trained):
    def answers(model):
        given = (model.params(), model.config, [[2, 5, 9, 11], [2, 40]], 6)
        return [
            list(answer)
            for answer in generate_tokens(*given, settings=model.settings, adapters=model.adapters())
        ]

    assert answers(trained["host"][0]) == answers(trained["device"][0])


def test_a_saved_model_has_it_there_again(tmp_path):
    model = build(HOST)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert host.holds(loaded.params()[TABLE])
    np.testing.assert_array_equal(loaded.params()[TABLE], model.params()[TABLE])


@pytest.mark.parametrize("part", ["weights", "embedding"])
def test_what_is_multiplied_stays_on_the_device(part):
    with pytest.raises(UserError, match="only the per-layer embedding can be 'host'"):
        build({part: "host"})
