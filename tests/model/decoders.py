"""Running a small decoder in tests, and measuring how far two results are apart."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_gemma_ft.model import gemma4, lora
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.weights import lora_targets

FLOAT32 = gemma4.Settings(jnp.float32)
VOCABULARY = 96


@dataclass(frozen=True)
class Decoder:
    """A configuration and its stacked weights."""

    config: Gemma4Config
    params: dict[str, Any]


def tokens(rows: int = 2, length: int = 40, seed: int = 0) -> np.ndarray:
    """Random token ids, int32 [rows, length]: rows five times as long as the window."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, (rows, length), np.int32)


def random_adapters(
    config: Gemma4Config, rank: int = 4, seed: int = 0, targets: str = "all-linear"
) -> dict[str, dict[str, np.ndarray]]:
    """Adapters of all linear layers, or others, in which B is random too, as after training."""
    rng = np.random.default_rng(seed)
    return {
        weight.name: {
            factor: rng.normal(0, 0.2, shape).astype(np.float32)
            for factor, shape in lora.shapes(weight, rank).items()
        }
        for weight in lora_targets(config, targets)
    }


def complete(token_ids: Any, positions: Any = None, segment_ids: Any = None) -> tuple[jax.Array, ...]:
    """Token ids, positions and segment ids; without the last two, each row is one example."""
    token_ids = jnp.asarray(token_ids, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(token_ids)
    return token_ids, jnp.asarray(positions, jnp.int32), jnp.asarray(segment_ids, jnp.int32)


def logits(
    decoder: Decoder,
    *rows: Any,
    settings: gemma4.Settings = FLOAT32,
    adapters: Any = None,
    dropout_key: Any = None,
) -> np.ndarray:
    """float32 [rows, length, vocabulary] of token ids, and positions and segment ids if there are any."""
    arguments = decoder.params, adapters, dropout_key, *complete(*rows)
    return np.asarray(_logits(decoder.config, settings, *arguments))


def gradients(
    decoder: Decoder,
    mask: Any,
    *rows: Any,
    settings: gemma4.Settings = FLOAT32,
    adapters: Any = None,
    train_base: bool = True,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Each token's loss as a target, [rows, length], logits, and the gradients of the losses' sum.

    The gradients are `adapters`, shaped like them, and with `train_base` `params`, shaped like the weights.
    """
    trained = {"adapters": adapters, "params": decoder.params if train_base else {}}
    frozen = {} if train_base else decoder.params
    (_, (losses, scores)), gradient = _gradients(
        decoder.config, settings, trained, frozen, jnp.asarray(mask, bool), *complete(*rows)
    )
    return np.asarray(losses), np.asarray(scores), jax.tree.map(np.asarray, gradient)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(config, settings, params, adapters, dropout_key, *rows):
    hidden = gemma4.hidden_states(
        params, config, *rows, settings=settings, adapters=adapters, dropout_key=dropout_key
    )
    return gemma4.logits(params, config, hidden)


@partial(jax.jit, static_argnums=(0, 1))
@partial(jax.value_and_grad, argnums=2, has_aux=True)
def _gradients(config, settings, trained, frozen, mask, *rows):
    params = trained["params"] or frozen
    hidden = gemma4.hidden_states(params, config, *rows, settings=settings, adapters=trained["adapters"])
    scores = gemma4.logits(params, config, hidden)
    of_next = jnp.take_along_axis(jax.nn.log_softmax(scores[:, :-1]), rows[0][:, 1:, None], axis=2)[..., 0]
    losses = jnp.pad(jnp.where(mask[:, 1:], -of_next, 0), ((0, 0), (1, 0)))
    return losses.sum(), (losses, scores)


def keras_hub_logits(backbone: Any, token_ids: np.ndarray) -> np.ndarray:
    """Logits of a KerasHub backbone, each row one example."""
    inputs = {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "position_ids": np.broadcast_to(np.arange(token_ids.shape[1], dtype=np.int32), token_ids.shape),
    }
    # Run by itself, it would compile hundreds of programs.
    run = jax.jit(lambda given: backbone.token_embedding(backbone(given), reverse=True))
    return np.asarray(run(inputs))


def distance(ours: Any, theirs: Any, least: float = 0.0) -> float:
    """The largest difference, relative to the largest magnitude, or to `least` if that is larger."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), least))
