"""Decoding with a K/V cache: pure, compiled functions on a batch of token ids.

`prefill` reads the prompts and chooses each row's first token; `extend` adds tokens until a limit, or until
all rows have stopped. The cache belongs to layers that compute K/V: one entry for every place in layers with
full attention, and one window of entries in the others, which go round: place p lies in entry p mod R. With 4
entries, after 6 tokens:

    entry    0  1  2  3
    holds    4  5  2  3     the next token, at place 6, sees 3 to 5 and itself, and then takes the entry of 2
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import gemma4
from keras_gemma_ft.model.config import Gemma4Config, LayerKind
from keras_gemma_ft.model.gemma4 import KV, Params, Settings
from keras_gemma_ft.model.projections import Adapters
from keras_gemma_ft.ops.attention import attention, decode_attention


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the order is that of transformers: temperature, top_k, top_p.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token, whatever the others are.
        top_k: Only the k most probable tokens; None: all.
        top_p: Of those, only the most probable ones that together reach this share; None: all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"{self.temperature!r} is negative", "temperature", "0 is greedy, 1 as trained.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"{self.top_k!r} leaves no token", "top_k", "64 is usual; None takes all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"{self.top_p!r} is no share", "top_p", "0.95 is usual; None takes all.")


class Plan(NamedTuple):
    """What is known when the functions are compiled.

    Attributes:
        config, settings: Of the decoder.
        sampling: How tokens are chosen.
        stop_ids: Tokens that end an answer, and are its last.
        room: Tokens that an answer has place for.
    """

    config: Gemma4Config
    settings: Settings
    sampling: Sampling
    stop_ids: tuple[int, ...]
    room: int


class State(NamedTuple):
    """Answers as far as they are known.

    Attributes:
        cache: `own/local` → k and v [groups, locals, B, K, entries, W]; `own/global` without `locals`.
        tokens: int32 [B, room], what was chosen; after a stop, 0.
        answer_length: int32, how many tokens that are.
        prompt_lengths: int32 [B]; 0 for rows that only fill up the batch.
        stopped: bool [B].
        keys: [B], of random numbers.
    """

    cache: dict[str, KV]
    tokens: jax.Array
    answer_length: jax.Array
    prompt_lengths: jax.Array
    stopped: jax.Array
    keys: jax.Array


@partial(jax.jit, static_argnums=0)
def prefill(
    plan: Plan,
    params: Params,
    adapters: Adapters | None,
    token_ids: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
) -> State:
    """Reads prompts, and chooses the first token of each answer.

    Args:
        plan: See `Plan`.
        params: The weights.
        adapters: LoRA factors.
        token_ids: int32 [B, T], prompts filled up on their right.
        lengths: int32 [B], of the prompts; 0 for rows that only fill up the batch.
        keys: [B], of random numbers.
    """
    rows, longest = token_ids.shape
    positions = jnp.broadcast_to(jnp.arange(longest), token_ids.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)

    def attend(kind: LayerKind, q: jax.Array, new: KV | None, shared: KV | None, _: Any) -> Any:
        kv = shared if new is None else new
        assert kv is not None, "a layer has its own K/V or shares some"
        out = attention(
            q, *kv, segment_ids=segment_ids, window=kind.window, implementation=plan.settings.implementation
        )
        entries = min(longest + plan.room, kind.window or longest + plan.room)
        places = jnp.maximum(_held(lengths - 1, entries), 0)  # what is put into unused entries is never seen
        return out, kv, tuple(_entries(array, places) for array in kv)

    hidden, cache = _decode(plan, params, adapters, token_ids, positions, attend)
    last = hidden[jnp.arange(rows), jnp.maximum(lengths - 1, 0)]
    empty = State(cache, jnp.zeros((rows, plan.room), jnp.int32), jnp.int32(0), lengths, lengths == 0, keys)
    return _choose(plan, params, empty, last)


# For a few rows, XLA would join gate with up, and q with k and v, by copying their weights in each step.
@partial(
    jax.jit,
    static_argnums=0,
    donate_argnums=1,
    compiler_options={"xla_disable_hlo_passes": "dot-merger"},
)
def extend(
    plan: Plan, state: State, params: Params, adapters: Adapters | None, limit: jax.Array | int
) -> State:
    """Adds tokens to all answers until they have `limit` of them, or have all stopped.

    Args:
        plan: That of `prefill`.
        state: Is used up.
        params, adapters: Those of `prefill`.
        limit: int32, at most `plan.room`.
    """

    # A scan copies each layer's weights out of their stack: half of a step's time where a weight meets but a
    # few rows (E4B, 32 rows, H100, jax 0.11.2: 16.1 ms a step, and 9.7 with all layers written out).
    if jax.default_backend() != "cpu":
        plan = plan._replace(settings=dataclasses.replace(plan.settings, unroll=True))

    def unfinished(state: State) -> jax.Array:
        return (state.answer_length < limit) & ~jnp.all(state.stopped)

    return jax.lax.while_loop(unfinished, partial(_add_token, plan, params, adapters), state)


def _add_token(plan: Plan, params: Params, adapters: Adapters | None, state: State) -> State:
    """Decodes the token chosen last, writes it into the cache, and chooses the next."""
    place = state.prompt_lengths + state.answer_length - 1
    newest = jax.lax.dynamic_index_in_dim(state.tokens, state.answer_length - 1, axis=1, keepdims=True)
    # KV-shared layers look at the last layer of their span that has K/V.
    last_of_span = {
        name.partition("/")[2]: jax.tree.map(lambda array: array.reshape(-1, *array.shape[-4:])[-1], kv)
        for name, kv in state.cache.items()
    }

    def attend(kind: LayerKind, q: jax.Array, new: KV | None, shared: KV | None, cached: KV | None) -> Any:
        kv = shared if new is None else new
        assert kv is not None, "a layer has its own K/V or shares some"
        cached_k, cached_v = last_of_span[kind.name.partition("/")[2]] if cached is None else cached
        held = _held(place - 1, cached_k.shape[-2])
        seen = held >= 0
        if kind.window is not None:
            seen &= place[:, None] - held < kind.window
        return decode_attention(q, *kv, cached_k, cached_v, seen), kv, kv

    hidden, new = _decode(plan, params, adapters, newest, place[:, None], attend, state.cache)
    cache = {
        name: (_written(k, new[name][0], place), _written(v, new[name][1], place))
        for name, (k, v) in state.cache.items()
    }
    return _choose(plan, params, state._replace(cache=cache), hidden[:, 0])


def _choose(plan: Plan, params: Params, state: State, hidden: jax.Array) -> State:
    """Chooses a token from hidden states [B, D]: the only logits that ever exist are [B, V]."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.answer_length)
    chosen = sample(gemma4.logits(params, plan.config, hidden), plan.sampling, keys)
    chosen = jnp.where(state.stopped, 0, chosen)
    stops = jnp.isin(chosen, jnp.array(plan.stop_ids, jnp.int32))
    tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, chosen, state.answer_length, axis=1)
    return state._replace(tokens=tokens, answer_length=state.answer_length + 1, stopped=state.stopped | stops)


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """Token ids, int32 [B], from logits [B, V]; `keys` [B] make the draws."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    ids = None
    if sampling.top_k is not None:
        logits, ids = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
    if sampling.top_p is not None:
        if ids is None:
            ids = jnp.argsort(logits, axis=-1, descending=True)
            logits = jnp.take_along_axis(logits, ids, axis=-1)
        shares = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        logits = jnp.where(before < sampling.top_p, logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


def _decode(
    plan: Plan,
    params: Params,
    adapters: Adapters | None,
    token_ids: jax.Array,
    positions: jax.Array,
    attend: gemma4.Attend,
    cache: dict[str, KV] | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    return gemma4.decode(
        params,
        plan.config,
        token_ids,
        positions,
        attend,
        settings=plan.settings,
        adapters=adapters,
        cache=cache,
    )


def _held(last: jax.Array, entries: int) -> jax.Array:
    """The place whose K/V each entry holds once `last` [B] is written, [B, entries]; negative: none."""
    return last[:, None] - (last[:, None] - jnp.arange(entries)) % entries


def _entries(array_BxTxKxW: jax.Array, places_BxR: jax.Array) -> jax.Array:
    """The cache's entries [B, K, R, W] from the K or V of a whole prompt."""
    return jnp.take_along_axis(array_BxTxKxW, places_BxR[:, :, None, None], axis=1).swapaxes(1, 2)


def _written(cached: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    """A cache [..., B, K, R, W] of all layers with the new K or V [..., B, 1, K, W] at `place` [B]."""
    lead = cached.shape[:-4]
    flat_LxBxKxRxW = cached.reshape(-1, *cached.shape[-4:])
    new_BxLxKxW = jnp.moveaxis(new[..., 0, :, :].reshape(-1, *cached.shape[-4:-2], cached.shape[-1]), 1, 0)
    rows, entry = jnp.arange(place.shape[0]), place % cached.shape[-2]
    written = flat_LxBxKxRxW.at[:, rows, :, entry].set(new_BxLxKxW)
    return written.reshape(*lead, *cached.shape[-4:])
