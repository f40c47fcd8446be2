"""A decoder's logits in float32, with one layer in memory at a time, on the host's CPU.

For comparing models that are larger than the memory: the weights are read from their `Source` while the
hidden states of a few rows pass through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_gemma_ft.model import gemma4
from keras_gemma_ft.model.config import Gemma4Config, Stage
from keras_gemma_ft.model.gemma4 import KV, Settings
from keras_gemma_ft.model.loading import Source
from keras_gemma_ft.model.projections import Adapters
from keras_gemma_ft.model.weights import Weight, table

_VOCABULARY_PIECE = 2**15  # rows of the embedding table in one product


def logits(
    source: Source,
    token_ids: np.ndarray,
    adapters: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    lora_scale: float = 1.0,
) -> np.ndarray:
    """Logits of rows of tokens, each row one example.

    Args:
        source: The weights.
        token_ids: int32 [B, T].
        adapters: `own/local/q_proj` → `lora_a`, `lora_b`, stacked; computed beside the weights, not merged.
        lora_scale: alpha / rank.

    Returns:
        float32 [B, T, V].
    """
    config = source.config
    weights = table(config)
    settings = Settings(
        jnp.float32, remat="none", lora_scale=lora_scale, implementation="reference", experts="tiled"
    )
    with _exact_arithmetic():
        x, per_layer = _embed(config, *_used_rows(source, weights, token_ids))
        shared: dict[str, KV] = {}
        for stage in config.stages:
            for group in range(stage.groups):
                for span, index in _places(stage, group):
                    prefix = f"{stage.name}/{span}/"
                    mine = {name: w for name, w in weights.items() if name.startswith(prefix)}
                    params = {w.role: jnp.asarray(source.part(w, index)) for w in mine.values()}
                    factors = {
                        mine[name].role: {factor: value[index] for factor, value in adapter.items()}
                        for name, adapter in (adapters or {}).items()
                        if name in mine
                    }
                    number = stage.layer_index(group, index[1] if span == "local" else None)
                    x, shared[span] = _layer(
                        config,
                        settings,
                        f"{stage.name}/{span}",
                        params,
                        factors,
                        None if per_layer is None else per_layer[number],
                        x,
                        None if stage.name == "own" else shared[span],
                    )
        norm, embedding = (source.part(weights[name], ()) for name in ("norm", "embed_tokens"))
        pieces = [
            _head(config, jnp.asarray(norm), jnp.asarray(embedding[i : i + _VOCABULARY_PIECE]), x)
            for i in range(0, config.vocab_size, _VOCABULARY_PIECE)
        ]
        return np.concatenate([np.asarray(piece) for piece in pieces], axis=-1)


# A program runs a few times only, so its compilation is what costs; and products are a library's anyway.
_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(_jit, static_argnums=0)
def _embed(
    config: Gemma4Config, tokens: jax.Array, params: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    x = gemma4.embed(params, config, tokens, jnp.float32)
    return x, gemma4._per_layer_inputs(params, config, tokens, x, jnp.float32)


@partial(_jit, static_argnums=0)
def _head(config: Gemma4Config, norm: jax.Array, embedding: jax.Array, x: jax.Array) -> jax.Array:
    x = gemma4.rms_norm(x, norm, config.rms_norm_eps)
    return gemma4.logits({"embed_tokens": embedding}, config, x)


@partial(_jit, static_argnums=(0, 1, 2))
def _layer(
    config: Gemma4Config,
    settings: Settings,
    kind_name: str,
    params: Mapping[str, Any],
    adapters: Adapters,
    per_layer: jax.Array | None,
    x: jax.Array,
    shared: KV | None,
) -> tuple[jax.Array, KV]:
    """One layer; returns the K/V that KV-shared layers are to use after it, too."""
    segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    positions = jnp.cumsum(segment_ids, axis=1) - 1
    kind = config.kind(*kind_name.split("/"))
    attend = gemma4.attend_within(segment_ids, settings)
    layer = gemma4._Layer(config, settings, kind, *gemma4.rope(positions, kind), attend, None)
    inputs = {"weights": params, "adapters": adapters, "per_layer": per_layer, "number": None, "cache": None}
    x, kv, _ = gemma4._decoder_layer(layer, inputs, x, shared)
    return x, kv


def _places(stage: Stage, group: int) -> list[tuple[str, tuple[int, ...]]]:
    """The layers of a group in order: their span, and their index in its stacks."""
    return [*(("local", (group, local)) for local in range(stage.locals_per_group)), ("global", (group,))]


def _used_rows(
    source: Source, weights: Mapping[str, Weight], token_ids: np.ndarray
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The ids, and the weights outside of the layers, the embeddings cut down to the rows that are used."""
    used, ids = np.unique(token_ids, return_inverse=True)
    params = {}
    for name, weight in weights.items():
        if not weight.in_layers:
            value = source.part(weight, ())
            params[name] = jnp.asarray(value[used] if weight.use == "embedding" else value)
    return jnp.asarray(ids.reshape(token_ids.shape), jnp.int32), params


@contextlib.contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """On the CPU where there is one for JAX, and without the shortcuts that accelerators take in float32."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS left it out
        device = jax.local_devices()[0]
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield
