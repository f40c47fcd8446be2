"""What training minimizes, as pure functions: summed losses of a decoder's rows, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import gemma4
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.gemma4 import Settings
from keras_gemma_ft.model.projections import Adapters
from keras_gemma_ft.ops.cross_entropy import cross_entropy_sum
from keras_gemma_ft.ops.dropout import fold

Batch = Mapping[str, Any]
"""`token_ids`, and optionally `positions`, `segment_ids` (int32), `loss_mask` (bool), each [rows, length]."""


def loss_sum(
    config: Gemma4Config,
    settings: Settings,
    params: gemma4.Params,
    adapters: Adapters | None,
    batch: Batch,
    key: jax.Array | None,
    *,
    train_embedding: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss in nats, and number, of a batch's supervised tokens."""
    hidden = gemma4.hidden_states(
        params,
        config,
        batch["token_ids"],
        batch["positions"],
        batch["segment_ids"],
        settings=settings,
        adapters=adapters,
        dropout_key=key,
    )
    targets, mask = _targets(batch["token_ids"], batch["segment_ids"], batch["loss_mask"])
    return cross_entropy_sum(
        hidden.reshape(-1, hidden.shape[-1]),
        params["embed_tokens"],
        targets.reshape(-1),
        mask.reshape(-1),
        soft_cap=config.final_logit_softcapping,
        train_embedding=train_embedding,
    )


def _targets(token_ids: jax.Array, segment_ids: jax.Array, loss_mask: jax.Array) -> tuple[Any, Any]:
    """The next token of each place, and whether it is learned: it is marked, and of the same example."""
    following = lambda array: jnp.pad(array[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    same = (segment_ids == following(segment_ids)) & (segment_ids != 0)
    return following(token_ids), following(loss_mask) & same


def accumulated(
    sums: Callable[..., tuple[jax.Array, jax.Array]],
    trainable: list[Any],
    batch: Batch,
    key: jax.Array | None,
    micro_batch_size: int | None,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Loss, tokens and gradients, summed over the micro-batches of a batch, one after the other."""
    compute = jax.value_and_grad(sums, has_aux=True)
    rows = batch["token_ids"].shape[0]
    size = micro_batch_size or rows
    if rows % size:
        raise UserError(
            f"batches of {rows} rows cannot be cut into micro-batches of {size}",
            where="micro_batch_size",
            remedy="let it divide the number of rows.",
        )
    if size == rows:
        (loss, tokens), gradients = compute(trainable, batch, key)
        return loss, tokens, gradients

    def add(carry: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        number, part = numbered
        (loss, tokens), gradients = compute(trainable, part, None if key is None else fold(key, number))
        return jax.tree.map(jnp.add, carry, (loss, tokens, gradients)), None

    start = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.int32),
        [jnp.zeros_like(value) for value in trainable],
    )
    parts = {name: value.reshape(-1, size, *value.shape[1:]) for name, value in batch.items()}
    (loss, tokens, gradients), _ = jax.lax.scan(add, start, (jnp.arange(rows // size), parts))
    return loss, tokens, gradients


@partial(jax.jit, static_argnums=(0, 1))
def logits(config: Gemma4Config, settings: Settings, params: Any, adapters: Any, *rows: Any) -> jax.Array:
    """float32 [rows, length, vocabulary] of `token_ids`, `positions`, `segment_ids`."""
    hidden = gemma4.hidden_states(params, config, *rows, settings=settings, adapters=adapters)
    return gemma4.logits(params, config, hidden)


@partial(jax.jit, static_argnums=(0, 1))
def row_losses(
    config: Gemma4Config, settings: Settings, params: Any, adapters: Any, *rows_and_mask: Any
) -> jax.Array:
    """Summed loss in nats of each row's supervised tokens, float32 [rows]; the row's mask is the last."""
    *rows, loss_mask = rows_and_mask
    hidden = gemma4.hidden_states(params, config, *rows, settings=settings, adapters=adapters)
    targets, mask = _targets(rows[0], rows[2], loss_mask)

    def one(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return cross_entropy_sum(
            row[0], params["embed_tokens"], *row[1:], soft_cap=config.final_logit_softcapping
        )[0]

    return jax.lax.map(one, (hidden, targets, mask))
