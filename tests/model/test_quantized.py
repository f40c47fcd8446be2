"""A decoder with quantized weights computes what it would with their dequantized values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FLOAT32, Decoder, distance, gradients, logits, random_adapters, tokens

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.loading import HFSource, load
from keras_gemma_ft.ops.quantize import QuantizedTensor, dequantize

EVERYTHING = {"weights": "nf4", "embedding": "nf4", "per_layer_embedding": "int8"}


def quantized(directory, dtype: str) -> Decoder:
    source = HFSource(directory)
    return Decoder(source.config, dict(load(source, dtype, EVERYTHING)))


def dequantized(decoder: Decoder, dtype: str) -> Decoder:
    return dataclasses.replace(decoder, params=_dequantized(decoder.params, dtype))


@functools.partial(jax.jit, static_argnums=1)
def _dequantized(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        name: dequantize(value, dtype) if isinstance(value, QuantizedTensor) else value
        for name, value in params.items()
    }


def test_logits(hf_directory, decoder):
    small = quantized(hf_directory("e2b"), "bfloat16")
    settings = dataclasses.replace(FLOAT32, dtype=jnp.dtype(jnp.bfloat16))
    found = logits(small, tokens(), settings=settings)
    # Both multiply the same values in the same dtype.
    assert distance(found, logits(dequantized(small, "bfloat16"), tokens(), settings=settings)) < 1e-6
    # It is really quantized: 4 bits a weight move the logits.
    assert distance(found, logits(decoder("e2b"), tokens())) > 0.05


def test_what_is_quantized(hf_directory):
    params = quantized(hf_directory("26b_a4b"), "float32").params
    kinds = {name: value.kind for name, value in params.items() if isinstance(value, QuantizedTensor)}
    assert set(kinds.values()) == {"nf4"}
    roles = {name.rpartition("/")[2] for name in kinds}
    assert {"experts_gate_up", "experts_down", "q_proj", "down_proj", "embed_tokens"} <= roles
    assert all(value.dtype == jnp.float32 for name, value in params.items() if name not in kinds)
    assert not {role for role in roles if "norm" in role or "router" in role or "scalar" in role}
    edge = quantized(hf_directory("e2b"), "float32").params
    assert edge["embed_tokens_per_layer"].kind == "int8"
    assert edge["own/local/per_layer_input_gate"].kind == "nf4"


def test_logits_and_gradients_of_adapters(hf_directory):
    small = quantized(hf_directory("26b_a4b"), "float32")
    adapters = random_adapters(small.config)
    mask = np.ones(tokens().shape, bool)
    (_, found, found_gradients), (_, expected, gradient_of) = (
        gradients(model, mask, tokens(), adapters=adapters, train_base=False)
        for model in (small, dequantized(small, "float32"))
    )
    assert distance(found, expected) < 1e-6
    for name, factors in gradient_of["adapters"].items():
        for factor, gradient in factors.items():
            assert distance(found_gradients["adapters"][name][factor], gradient) < 1e-5, (name, factor)


def test_a_part_that_the_model_does_not_have_is_refused(hf_directory):
    with pytest.raises(UserError, match=r"quantization.per_layer_embedding: this model has no per-layer"):
        GemmaCausalLM.from_preset(str(hf_directory("31b")), {"per_layer_embedding": "int8"})
