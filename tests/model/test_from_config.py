"""What a config makes of a model."""

import jax.numpy as jnp
import pytest

from keras_gemma_ft.config import default_config
from keras_gemma_ft.model import objective
from keras_gemma_ft.model.from_config import build_model


@pytest.mark.parametrize("unroll", [True, False])
def test_layers_are_written_out_for_training_and_nowhere_else(monkeypatch, unroll):
    config = default_config()
    config.preset, config.precision, config.train.unroll = "gemma4_tiny", "float32", unroll
    model = build_model(config)
    seen = []
    for name in ("loss_sum", "logits", "row_losses"):
        monkeypatch.setattr(objective, name, lambda _, settings, *rest, **more: seen.append(settings.unroll))
    rest = [variable.value for variable in model.non_trainable_variables]
    trainable = [variable.value for variable in model.trainable_variables]
    for training in (True, False):
        model._loss_sums(rest, training)(trainable, {}, None)
    ids = jnp.ones((1, 4), jnp.int32)
    model.logits(ids)
    model.row_losses({"token_ids": ids, "loss_mask": ids > 0})
    assert seen == [unroll, False, False, False]
