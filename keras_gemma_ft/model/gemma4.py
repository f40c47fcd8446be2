"""The Gemma 4 text decoder: pure functions over stacked weights.

`lax.scan` runs over the repeating block of a stage (some local layers, then one global layer), so that at
most four bodies compile, whatever the depth. The formulas are those of transformers' modeling_gemma4.py.

Shape suffixes: B rows, T tokens, D hidden size, H query heads, K key heads, W head dim, L layers, P width of
the per-layer input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from keras_gemma_ft.model.config import Gemma4Config, LayerKind, Stage
from keras_gemma_ft.model.projections import Adapters, Matrix, Projections, linear
from keras_gemma_ft.ops import cross_entropy, host, moe, quantize
from keras_gemma_ft.ops.attention import attention
from keras_gemma_ft.ops.attention_mask import RESIDUALS
from keras_gemma_ft.ops.dropout import fold
from keras_gemma_ft.ops.gated_gelu import gelu_product
from keras_gemma_ft.ops.grouped_matmul import Implementation
from keras_gemma_ft.ops.quantize import Placed, QuantizedTensor

Params: TypeAlias = Mapping[str, Any]
"""By name as in `model/weights.py`: `embed_tokens`, `own/local/q_proj`, … A matrix may be quantized."""
KV: TypeAlias = tuple[jax.Array, jax.Array]
Attend: TypeAlias = Callable[[LayerKind, jax.Array, KV | None, KV | None, Any], tuple[jax.Array, KV, Any]]
"""How a layer attends. It is given its kind, q [B, T, H, W], its own k and v [B, T, K, W] (None if it shares
them), those that KV-shared layers use, and its cache; it gives the output [B, T, H, W], k and v for layers
that share them, and the new cache."""

Remat = Literal[
    "full", "attention", "down", "sublayers", "outputs", "feed_forward", "matmuls", "none", "offload"
]
# What the backward pass finds ready-made besides each layer's input; all else it computes again.
_DOWN = ("down_proj", "low")
_SUBLAYERS = (*_DOWN, "o_proj")
_FEED_FORWARD = (RESIDUALS, *_SUBLAYERS, "gate_proj", "up_proj")
_NAMES = {
    "full": (),
    "attention": (RESIDUALS,),
    "down": _DOWN,
    "sublayers": _SUBLAYERS,
    "outputs": (RESIDUALS, *_DOWN),
    "feed_forward": _FEED_FORWARD,
    "matmuls": (*_FEED_FORWARD, "q_proj", "k_proj", "v_proj", "per_layer_input_gate", "per_layer_projection"),
}


@dataclass(frozen=True)
class Settings:
    """How the decoder is computed; what is computed does not depend on it, dropout aside.

    Attributes:
        dtype: Of activations.
        remat: What is recomputed in the backward pass: "full" keeps each layer's input; "attention" also what
            attention's backward pass needs; "down" instead what the feed-forward network gives, and what the
            adapters' A give; "sublayers" also what o_proj gives; "outputs" what "attention" and "down" keep;
            "feed_forward" also what o_proj, gate_proj and up_proj give;
            "matmuls" also the other projections' outputs; "none" keeps all; "offload" keeps each layer's
            input in host memory.
        unroll: Whether all layers are written out instead of scanned over. What the backward pass is to find
            is then copied into no stack; but the program takes a minute to compile.
        lora_scale: alpha / rank.
        lora_dropout: Share of an adapter's inputs dropped where a key is given.
        implementation: Rung of the attention ladder; None: the platform's first.
        experts: Rung of the ladder of grouped products, or "auto".
    """

    dtype: Any = jnp.bfloat16
    remat: Remat = "full"
    unroll: bool = False
    lora_scale: float = 1.0
    lora_dropout: float = 0.0
    implementation: str | None = None
    experts: Implementation = "auto"


@dataclass(frozen=True)
class _Layer:
    """What a layer needs besides its input, the same for all layers of a kind.

    `frozen` holds the stacks of weights where these are not trained. Each layer then takes its own out of the
    stack. As inputs of the scan they would be copied out twice, once for the block and once for the layer.
    But if they are trained, their gradients would be added up in full size in every layer.
    """

    config: Gemma4Config
    settings: Settings
    kind: LayerKind
    cos: jax.Array
    sin: jax.Array
    attend: Attend
    dropout_key: jax.Array | None
    frozen: Mapping[str, Matrix] | None = None


# --- Public -------------------------------------------------------------------------------------------------


def hidden_states(
    params: Params,
    config: Gemma4Config,
    token_ids: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    settings: Settings,
    adapters: Adapters | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The last layer's normed output for packed rows.

    Args:
        params: The weights.
        config: Of the decoder.
        token_ids: int32 [B, T].
        positions: int32 [B, T], from 0 in each example.
        segment_ids: int32 [B, T]; tokens attend within their segment only, 0 is padding.
        settings: See `Settings`.
        adapters: LoRA factors.
        dropout_key: uint32 [2]; None: no dropout.

    Returns:
        [B, T, D] in the dtype of activations.
    """
    return decode(
        params,
        config,
        token_ids,
        positions,
        attend_within(segment_ids, settings),
        settings=settings,
        adapters=adapters,
        dropout_key=dropout_key,
    )[0]


def attend_within(segment_ids: jax.Array, settings: Settings) -> Attend:
    """Attention of whole rows to themselves, segment by segment, without a cache."""

    def attend(
        kind: LayerKind, q: jax.Array, new: KV | None, shared: KV | None, cache: None
    ) -> tuple[jax.Array, KV, None]:
        kv = shared if new is None else new
        assert kv is not None, "a layer has its own K/V or shares some"
        out = attention(
            q, *kv, segment_ids=segment_ids, window=kind.window, implementation=settings.implementation
        )
        return out, kv, None

    return attend


def decode(
    params: Params,
    config: Gemma4Config,
    token_ids: jax.Array,
    positions: jax.Array,
    attend: Attend,
    *,
    settings: Settings,
    adapters: Adapters | None = None,
    dropout_key: jax.Array | None = None,
    cache: Mapping[str, Any] | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """All layers, with any way to attend; `hidden_states` for training, `generation.py` with a K/V cache.

    Args:
        params, config, token_ids, positions, settings, adapters, dropout_key: As for `hidden_states`.
        attend: See `Attend`.
        cache: `own/local` → a pytree with leading axes [groups, locals], `own/global` → [groups].

    Returns:
        Hidden states [B, T, D], and the new caches that `attend` gave, stacked like `cache`.
    """
    x = embed(params, config, token_ids, settings.dtype)
    per_layer = _per_layer_inputs(params, config, token_ids, x, settings.dtype)
    shared: dict[str, KV] = {}
    caches: dict[str, Any] = {}
    for stage in config.stages:
        layers = _layers(stage, config, settings, positions, attend, dropout_key)
        x, shared, new = _run_stage(stage, layers, params, adapters or {}, cache or {}, per_layer, x, shared)
        caches |= new
    return rms_norm(x, params["norm"], config.rms_norm_eps), caches


def embed(params: Params, config: Gemma4Config, token_ids: jax.Array, dtype: Any) -> jax.Array:
    """Scaled embeddings [B, T, D] of tokens; the scale is rounded to the dtype, as the model was trained."""
    return _rows(params["embed_tokens"], token_ids, dtype) * jnp.asarray(config.embedding_scale, dtype)


def logits(params: Params, config: Gemma4Config, hidden: jax.Array) -> jax.Array:
    """float32 [..., V] of hidden states [..., D], soft-capped."""
    scores = cross_entropy.scores(hidden, params["embed_tokens"])
    cap = config.final_logit_softcapping
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def rms_norm(x: jax.Array, weight: jax.Array | None, epsilon: float) -> jax.Array:
    """x / rms(x) · weight over the last axis, computed in float32, in x's dtype."""
    return _rms_norm(x, weight, epsilon)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array | None, epsilon: float) -> jax.Array:
    # Under `checkpoint` the backward pass keeps x in its own dtype, and none of the float32 steps.
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (normed if weight is None else normed * weight.astype(jnp.float32)).astype(x.dtype)


def rope(positions: jax.Array, kind: LayerKind) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [B, T, W/2], of a kind of layer.

    "Proportional" partial rotation: the wavelengths are those of the whole head, of which only the first
    share turns; the others stand still (angle 0).
    """
    half = kind.head_dim // 2
    turning = int(kind.rotary_fraction * kind.head_dim // 2)
    frequencies = np.zeros(half, np.float32)
    exponents = np.arange(0, 2 * turning, 2, dtype=np.float32) / kind.head_dim
    frequencies[:turning] = 1.0 / np.float32(kind.rope_theta) ** exponents
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


# --- Stages -------------------------------------------------------------------------------------------------


def _spans(stage: Stage) -> tuple[str, ...]:
    return ("local", "global") if stage.locals_per_group else ("global",)


def _layers(
    stage: Stage,
    config: Gemma4Config,
    settings: Settings,
    positions: jax.Array,
    attend: Attend,
    dropout_key: jax.Array | None = None,
) -> dict[str, _Layer]:
    """What the layers of each span of a stage have in common."""
    layers = {}
    for span in _spans(stage):
        kind = config.kind(stage.name, span)
        layers[span] = _Layer(config, settings, kind, *rope(positions, kind), attend, dropout_key)
    return layers


def _run_stage(
    stage: Stage,
    layers: Mapping[str, _Layer],
    params: Params,
    adapters: Adapters,
    cache: Mapping[str, Any],
    per_layer_LxBxTxP: jax.Array | None,
    x: jax.Array,
    shared: dict[str, KV],
) -> tuple[jax.Array, dict[str, KV], dict[str, Any]]:
    """Scans over the groups of a stage. The K/V of the last own layer of each kind come out in the carry."""
    owns = stage.name == "own"
    inputs: dict[str, Any] = {}
    for span in _spans(stage):
        prefix = f"{stage.name}/{span}/"
        numbers = np.array(
            [
                [stage.layer_index(group, local) for local in range(stage.locals_per_group)]
                if span == "local"
                else stage.layer_index(group, None)
                for group in range(stage.groups)
            ]
        )
        weights, is_frozen = _under(prefix, params), bool(adapters)
        if is_frozen:
            layers = {**layers, span: replace(layers[span], frozen=weights)}
        inputs[span] = {
            "weights": None if is_frozen else weights,
            "place": jnp.asarray(np.moveaxis(np.indices(numbers.shape), 0, -1)),
            "adapters": _under(prefix, adapters),
            "number": jnp.asarray(numbers, jnp.uint32),
            "per_layer": None if per_layer_LxBxTxP is None else per_layer_LxBxTxP[numbers],
            "cache": cache.get(prefix.rstrip("/")),
        }
    run = {span: _rematerialized(layer) for span, layer in layers.items()}

    def group(carry: tuple[jax.Array, dict[str, Any]], xs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x, kv = carry
        caches = {}
        if "local" in xs:

            def local(carry: tuple[jax.Array, Any], xs: dict[str, Any]) -> tuple[Any, Any]:
                x, kv = carry
                x, kv, new = run["local"](xs, x, kv)
                return (x, kv), new

            (x, kv_local), caches["local"] = jax.lax.scan(
                local, (x, kv.get("local")), xs["local"], unroll=layers["local"].settings.unroll
            )
            kv = {**kv, "local": kv_local}
        x, kv_global, caches["global"] = run["global"](xs["global"], x, kv.get("global"))
        return (x, {**kv, "global": kv_global}), caches

    def shared_group(x: jax.Array, xs: dict[str, Any]) -> tuple[jax.Array, None]:
        (x, _), _ = group((x, shared), xs)
        return x, None

    unroll = layers["global"].settings.unroll
    if not owns:
        x, _ = jax.lax.scan(shared_group, x, inputs, unroll=unroll)
        return x, shared, {}
    start = {span: _no_kv(layers[span], run[span], inputs[span], x) for span in _spans(stage)}
    (x, kv), caches = jax.lax.scan(group, (x, start), inputs, unroll=unroll)
    return x, kv, {f"{stage.name}/{span}": new for span, new in caches.items()}


def _no_kv(layer: _Layer, run: Callable[..., Any], inputs: dict[str, Any], x: jax.Array) -> KV:
    """Zeros of the shape of a layer's K/V: what the scan's carry holds before the first layer."""
    first = jax.tree.map(lambda leaf: leaf[(0,) * (2 if layer.kind.window else 1)], inputs)
    shapes = jax.eval_shape(run, first, x, None)[1]
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _under(prefix: str, items: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): item for name, item in items.items() if name.startswith(prefix)}


def _rematerialized(layer: _Layer) -> Callable[..., Any]:
    run = partial(_decoder_layer, layer)
    settings = layer.settings
    if settings.remat == "none":
        return run
    policies = jax.checkpoint_policies
    if settings.remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*_NAMES[settings.remat])
    # Inside a scan nothing can be merged with the forward pass; where layers are written out, it must not.
    return jax.checkpoint(run, policy=policy, prevent_cse=settings.unroll)


# --- One layer ----------------------------------------------------------------------------------------------


def _decoder_layer(
    layer: _Layer, inputs: dict[str, Any], x: jax.Array, shared: KV | None
) -> tuple[jax.Array, KV, Any]:
    """One layer: `inputs` holds its weights or their place, adapters, number, per-layer input and cache."""
    config = layer.config
    w = inputs["weights"] if layer.frozen is None else _placed(layer.frozen, inputs["place"])
    if layer.settings.remat == "offload":
        x = checkpoint_name(x, "layer_input")
    norm = partial(_normed, w, config.rms_norm_eps)
    settings, key = layer.settings, layer.dropout_key
    key = None if key is None else fold(key, inputs["number"])
    project = Projections(w, inputs["adapters"], settings.lora_scale, settings.lora_dropout, key)

    attended, kv, cache = _attention(layer, w, project, norm(x, "input_layernorm"), shared, inputs["cache"])
    x = x + norm(attended, "post_attention_layernorm")

    fed = project.feed_forward(norm(x, "pre_feedforward_layernorm"))
    if config.num_experts:
        fed = norm(fed, "post_feedforward_layernorm_1") + norm(
            _experts(layer, w, inputs["adapters"], x, norm(x, "pre_feedforward_layernorm_2")),
            "post_feedforward_layernorm_2",
        )
    x = x + norm(fed, "post_feedforward_layernorm")

    if inputs["per_layer"] is not None:
        gate = project(("per_layer_input_gate",), x, 4)[0]
        product = gelu_product(gate, inputs["per_layer"])
        projected = project(("per_layer_projection",), product, 5)[0]
        x = x + norm(projected, "post_per_layer_input_norm")
    return x * w["layer_scalar"].astype(x.dtype), kv, cache


def _placed(stacks: Mapping[str, Matrix], place: jax.Array) -> dict[str, Any]:
    """A layer's weights, at `place` of their stacks; what is quantized stays there until it is multiplied."""
    return {
        name: Placed(stack, place) if isinstance(stack, QuantizedTensor) else quantize.take(stack, place)
        for name, stack in stacks.items()
    }


def _normed(w: Mapping[str, jax.Array], epsilon: float, x: jax.Array, name: str) -> jax.Array:
    return rms_norm(x, w[name], epsilon)


def _attention(
    layer: _Layer,
    w: Mapping[str, Any],
    project: Projections,
    x: jax.Array,
    shared: KV | None,
    cache: Any,
) -> tuple[jax.Array, KV, Any]:
    kind, config = layer.kind, layer.config
    heads = lambda array: array.reshape(*x.shape[:2], -1, kind.head_dim)  # noqa: E731
    roles: tuple[str, ...] = ("q_proj",)
    if kind.owns_kv:
        roles = ("q_proj", "k_proj") if kind.k_eq_v else ("q_proj", "k_proj", "v_proj")
    q, *kv = project(roles, x, 0)
    norm = partial(_normed, w, config.rms_norm_eps)
    q_BxTxHxW = _rotate(norm(heads(q), "q_norm"), layer.cos, layer.sin)
    new = None
    if kind.owns_kv:
        k, v = kv[0], kv[-1]  # one and the same where K = V
        k_BxTxKxW = _rotate(norm(heads(k), "k_norm"), layer.cos, layer.sin)
        new = k_BxTxKxW, rms_norm(heads(v), None, config.rms_norm_eps)
    out, kv_shared, new_cache = layer.attend(kind, q_BxTxHxW, new, shared, cache)
    return project(("o_proj",), out.reshape(*x.shape[:2], -1), 1)[0], kv_shared, new_cache


@partial(jax.checkpoint, prevent_cse=False)
def _rotate(x_BxTxHxW: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + W/2) by their angles, in float32."""
    first, second = jnp.split(x_BxTxHxW.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxHxW.dtype)


def _experts(
    layer: _Layer,
    w: Mapping[str, Any],
    adapters: Mapping[str, Mapping[str, jax.Array]],
    x: jax.Array,
    normed: jax.Array,
) -> jax.Array:
    """The mixture of experts: routed by the layer's hidden state, fed by its norm.

    Its adapters have no dropout, as PEFT's of three-dimensional parameters have none.
    """
    config = layer.config
    gate_up, down = adapters.get("experts_gate_up", {}), adapters.get("experts_down", {})
    lora = None
    if gate_up or down:
        lora = moe.ExpertLora(
            gate_up.get("lora_a"),
            gate_up.get("lora_b"),
            down.get("lora_a"),
            down.get("lora_b"),
            layer.settings.lora_scale,
        )
    flat = x.reshape(-1, x.shape[-1])
    indices, shares = moe.route(
        flat,
        w["router_scale"],
        w["router_proj"],
        w["router_per_expert_scale"],
        config.top_k_experts,
        config.rms_norm_eps,
    )
    out = moe.expert_ffn(
        normed.reshape(flat.shape),
        indices,
        shares,
        w["experts_gate_up"],
        w["experts_down"],
        lora,
        implementation=layer.settings.experts,
    )
    return out.reshape(x.shape)


# --- Embeddings ---------------------------------------------------------------------------------------------


def _rows(table: cross_entropy.Table, ids: jax.Array, dtype: Any) -> jax.Array:
    if isinstance(table, QuantizedTensor):
        return quantize.gather_rows(table, ids, dtype)
    rows = host.gather_rows(table, ids) if host.holds(table) else table[ids]
    return rows.astype(dtype)


def _per_layer_inputs(
    params: Params, config: Gemma4Config, token_ids: jax.Array, embedded: jax.Array, dtype: Any
) -> jax.Array | None:
    """What each layer is given besides the hidden state, [L, B, T, P]; None for models without."""
    width = config.hidden_size_per_layer_input
    if not width:
        return None
    shape = (*token_ids.shape, config.num_hidden_layers, width)
    looked_up = _rows(params["embed_tokens_per_layer"], token_ids, dtype) * jnp.asarray(width**0.5, dtype)
    context = linear(embedded, params["per_layer_model_projection"])
    context = (context * jnp.asarray(config.hidden_size**-0.5, dtype)).reshape(shape)
    context = rms_norm(context, params["per_layer_projection_norm"], config.rms_norm_eps)
    both = (context + looked_up.reshape(shape)) * jnp.asarray(2**-0.5, dtype)
    return jnp.moveaxis(both, 2, 0)
