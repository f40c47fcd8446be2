"""The one table of names: every weight of a decoder, in our stacks and in the files of others.

Ours are stacked: `own/local/q_proj` holds the query projections of all layers that compute K/V and have a
sliding window, [groups, locals_per_group, out, in]; `own/global/q_proj` those with full attention, [groups,
out, in]. Matrices are [out, in] as in Hugging Face's files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.config import Gemma4Config, LayerKind

Use = Literal["matrix", "experts", "embedding", "small"]

# The seven projections of the text decoder, which "all-linear" means.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Ours → Hugging Face's, within a layer.
LAYER_NAMES = {
    "input_layernorm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_proj": "self_attn.k_proj.weight",
    "k_norm": "self_attn.k_norm.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "post_feedforward_layernorm": "post_feedforward_layernorm.weight",
    "router_scale": "router.scale",
    "router_proj": "router.proj.weight",
    "router_per_expert_scale": "router.per_expert_scale",
    "experts_gate_up": "experts.gate_up_proj",
    "experts_down": "experts.down_proj",
    "post_feedforward_layernorm_1": "post_feedforward_layernorm_1.weight",
    "pre_feedforward_layernorm_2": "pre_feedforward_layernorm_2.weight",
    "post_feedforward_layernorm_2": "post_feedforward_layernorm_2.weight",
    "per_layer_input_gate": "per_layer_input_gate.weight",
    "per_layer_projection": "per_layer_projection.weight",
    "post_per_layer_input_norm": "post_per_layer_input_norm.weight",
    "layer_scalar": "layer_scalar",
}
# Likewise, outside of the layers.
MODEL_NAMES = {
    "embed_tokens": "embed_tokens.weight",
    "embed_tokens_per_layer": "embed_tokens_per_layer.weight",
    "per_layer_model_projection": "per_layer_model_projection.weight",
    "per_layer_projection_norm": "per_layer_projection_norm.weight",
    "norm": "norm.weight",
}
_MATRICES = (*ALL_LINEAR, "per_layer_input_gate", "per_layer_projection")


@dataclass(frozen=True)
class Weight:
    """One of our stacked weights.

    Attributes:
        name: `own/local/q_proj`, or `norm` outside of the layers.
        shape: Of one layer's weight, or of the weight itself.
        layers: Layer numbers in the order of the stack, int [groups, locals] or [groups]; [] outside.
        use: "matrix" (may be quantized), "experts" (likewise, 3-D), "embedding" (has its own setting), or
            "small": norms, scalars, the router, which stay as they are.
    """

    name: str
    shape: tuple[int, ...]
    layers: np.ndarray
    use: Use

    @property
    def role(self) -> str:
        """The name within a layer."""
        return self.name.rpartition("/")[2]

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        return (*self.layers.shape, *self.shape) if self.in_layers else self.shape

    @property
    def in_layers(self) -> bool:
        return "/" in self.name

    @property
    def size(self) -> int:
        return math.prod(self.stacked_shape)

    def hf_names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index in the stack, Hugging Face's name without the `model.` in front) of each part."""
        if not self.in_layers:
            yield (), MODEL_NAMES[self.name]
            return
        for index in np.ndindex(self.layers.shape):
            yield index, f"layers.{self.layers[index]}.{LAYER_NAMES[self.role]}"


def table(config: Gemma4Config) -> dict[str, Weight]:
    """Every weight of a decoder by our name, in the order of the forward pass."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    none = np.zeros(0, int)
    weights = [Weight("embed_tokens", (vocabulary, hidden), none, "embedding")]
    if per_layer := config.hidden_size_per_layer_input:
        width = per_layer * config.num_hidden_layers
        weights += [
            Weight(
                "embed_tokens_per_layer",
                (config.vocab_size_per_layer_input or vocabulary, width),
                none,
                "embedding",
            ),
            Weight("per_layer_model_projection", (width, hidden), none, "matrix"),
            Weight("per_layer_projection_norm", (per_layer,), none, "small"),
        ]
    for stage in config.stages:
        for span in ("local", "global"):
            if span == "local":
                if not stage.locals_per_group:
                    continue
                layers = np.array(
                    [
                        [stage.layer_index(group, local) for local in range(stage.locals_per_group)]
                        for group in range(stage.groups)
                    ]
                )
            else:
                layers = np.array([stage.layer_index(group, None) for group in range(stage.groups)])
            kind = config.kind(stage.name, span)
            for role, shape in _layer_shapes(config, kind).items():
                use: Use = "small"
                if role in _MATRICES:
                    use = "matrix"
                elif role in ("experts_gate_up", "experts_down"):
                    use = "experts"
                weights.append(Weight(f"{stage.name}/{span}/{role}", shape, layers, use))
    weights.append(Weight("norm", (hidden,), none, "small"))
    return {weight.name: weight for weight in weights}


def _layer_shapes(config: Gemma4Config, kind: LayerKind) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries, keys = heads * kind.head_dim, kind.num_kv_heads * kind.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "q_proj": (queries, hidden),
        "q_norm": (kind.head_dim,),
    }
    if kind.owns_kv:
        shapes |= {"k_proj": (keys, hidden), "k_norm": (kind.head_dim,)}
        if not kind.k_eq_v:
            shapes["v_proj"] = (keys, hidden)
    shapes |= {
        "o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "gate_proj": (kind.intermediate_size, hidden),
        "up_proj": (kind.intermediate_size, hidden),
        "down_proj": (hidden, kind.intermediate_size),
        "post_feedforward_layernorm": (hidden,),
    }
    if config.num_experts:
        experts, width = config.num_experts, config.moe_intermediate_size
        shapes |= {
            "router_scale": (hidden,),
            "router_proj": (experts, hidden),
            "router_per_expert_scale": (experts,),
            "experts_gate_up": (experts, 2 * width, hidden),
            "experts_down": (experts, hidden, width),
            "post_feedforward_layernorm_1": (hidden,),
            "pre_feedforward_layernorm_2": (hidden,),
            "post_feedforward_layernorm_2": (hidden,),
        }
    if per_layer := config.hidden_size_per_layer_input:
        shapes |= {
            "per_layer_input_gate": (per_layer, hidden),
            "per_layer_projection": (hidden, per_layer),
            "post_per_layer_input_norm": (hidden,),
        }
    return shapes | {"layer_scalar": (1,)}


def lora_targets(config: Gemma4Config, targets: str | tuple[str, ...] = "all-linear") -> list[Weight]:
    """The stacked matrices that get adapters.

    Args:
        config: Of the model.
        targets: "all-linear", or roles, as a tuple or with commas between (`"q_proj,v_proj"`).

    Raises:
        UserError: A role is not one of a layer's matrices.
    """
    if targets == "all-linear":
        roles: tuple[str, ...] = ALL_LINEAR
    else:
        names = targets.split(",") if isinstance(targets, str) else targets
        roles = tuple(name.strip() for name in names)
    known = [role for role in _MATRICES if config.hidden_size_per_layer_input or role in ALL_LINEAR]
    for role in roles:
        if role not in known:
            raise UserError(
                f"{role!r} is no matrix of this decoder's layers",
                where="lora.targets",
                remedy=f"use all-linear, or some of {', '.join(known)}, with commas between.",
            )
    return [weight for weight in table(config).values() if weight.in_layers and weight.role in roles]
