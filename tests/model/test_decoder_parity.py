"""Our decoder's logits against transformers' and KerasHub's, in float32, for every kind of Gemma 4."""

import dataclasses

import numpy as np
import pytest
from decoders import Decoder, distance, keras_hub_logits, logits, tokens
from small_models import KINDS

# Float32 sums in another order; measured: at most 2e-6. Any fault of the formulas is far above.
TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(decoder, torch_model, kind):
    import torch

    rows = tokens()
    with torch.no_grad():
        theirs = torch_model(kind)(torch.from_numpy(rows).long()).logits.numpy()
    assert np.abs(theirs).max() > 1 and np.abs(theirs).max() < 30  # neither flat nor all at the soft cap
    assert distance(logits(decoder(kind), rows), theirs) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_keras_hub(decoder, keras_hub_backbone, kind):
    rows = tokens()
    theirs = keras_hub_logits(keras_hub_backbone(kind), rows)
    assert distance(logits(decoder(kind), rows), theirs) < TOLERANCE


def swapped(first: str, second: str):
    def change(decoder: Decoder) -> Decoder:
        params = dict(decoder.params)
        for place in {name.rpartition("/")[0] for name in params if "/" in name}:
            one, other = f"{place}/{first}", f"{place}/{second}"
            params[one], params[other] = params[other], params[one]
        return dataclasses.replace(decoder, params=params)

    return change


def configured(**fields):
    return lambda decoder: dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, **fields))


def without_scalars(decoder: Decoder) -> Decoder:
    params = {
        name: value * 0 + 1 if name.endswith("layer_scalar") else value
        for name, value in decoder.params.items()
    }
    return dataclasses.replace(decoder, params=params)


def one_layer_late(decoder: Decoder) -> Decoder:
    """The last two groups of own layers change places, so that shared layers take K/V from the wrong ones."""
    params = {
        name: value[::-1] if name.startswith("own/") else value for name, value in decoder.params.items()
    }
    return dataclasses.replace(decoder, params=params)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param("31b", configured(sliding_window=9), id="window too long by one"),
        pytest.param("31b", configured(global_rotary_fraction=0.5), id="too many frequencies turn"),
        pytest.param("e4b", without_scalars, id="no layer scalars"),
        pytest.param("e4b", one_layer_late, id="K/V of the wrong layers"),
        pytest.param(
            "e4b", swapped("post_attention_layernorm", "pre_feedforward_layernorm"), id="norms swapped"
        ),
        pytest.param(
            "26b_a4b", swapped("pre_feedforward_layernorm", "pre_feedforward_layernorm_2"), id="paths swapped"
        ),
    ],
)
def test_a_fault_would_be_seen(decoder, kind, fault):
    rows = tokens()
    sound = decoder(kind)
    assert distance(logits(fault(sound), rows), logits(sound, rows)) > 10 * TOLERANCE
