"""The one table of names: every weight of a decoder, in our stacks and in the files of others.

Ours are stacked: `own/local/q_proj` holds the query projections of all layers that compute K/V and have a
sliding window, [groups, locals_per_group, out, in]; `own/global/q_proj` those with full attention, [groups,
out, in]. Matrices are [out, in] as in Hugging Face's files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
# Ours → GGUF's, in the order of the two tables above; within a layer N, `blk.N.` stands in front.
GGUF_NAMES = {
    "embed_tokens": "token_embd.weight",
    "embed_tokens_per_layer": "per_layer_token_embd.weight",
    "per_layer_model_projection": "per_layer_model_proj.weight",
    "per_layer_projection_norm": "per_layer_proj_norm.weight",
    "norm": "output_norm.weight",
    "input_layernorm": "attn_norm.weight",
    "q_proj": "attn_q.weight",
    "q_norm": "attn_q_norm.weight",
    "k_proj": "attn_k.weight",
    "k_norm": "attn_k_norm.weight",
    "v_proj": "attn_v.weight",
    "o_proj": "attn_output.weight",
    "post_attention_layernorm": "post_attention_norm.weight",
    "pre_feedforward_layernorm": "ffn_norm.weight",
    "gate_proj": "ffn_gate.weight",
    "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight",
    "post_feedforward_layernorm": "post_ffw_norm.weight",
    "router_scale": "ffn_gate_inp.scale",
    "router_proj": "ffn_gate_inp.weight",
    "router_per_expert_scale": "ffn_down_exps.scale",
    "experts_gate_up": "ffn_gate_up_exps.weight",
    "experts_down": "ffn_down_exps.weight",
    "post_feedforward_layernorm_1": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2": "post_ffw_norm_2.weight",
    "per_layer_input_gate": "inp_gate.weight",
    "per_layer_projection": "proj.weight",
    "post_per_layer_input_norm": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}
# What transformers puts in front of a name: in a text decoder alone, and in a whole Gemma 4 with its towers.
TEXT_PREFIX, WHOLE_PREFIX = "model.", "model.language_model."
_PEFT_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_MATRICES = (*ALL_LINEAR, "per_layer_input_gate", "per_layer_projection")
EXPERTS = ("experts_gate_up", "experts_down")


@dataclass(frozen=True)
class KerasHubWeight:
    """Where a KerasHub `Gemma4Backbone` keeps a weight, and how it lies there.

    Attributes:
        variables: (layer, attribute, number among the layer's own variables), with the layer as a path from
            the decoder block, or from the backbone. Two are the halves of our rows.
        axes: What order of a variable's axes is ours, once the heads stand apart; None: its own.
        heads: Which of our axes is heads × head_dim in one; there it is two.
        file_layer: The layer's name in files of weights, where it is no attribute's.
    """

    variables: tuple[tuple[str, str, int], ...]
    axes: tuple[int, ...] | None = None
    heads: int | None = None
    file_layer: str | None = None

    def shape(self, ours: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
        """Shape of a variable of this weight, whose shape with us is `ours`."""
        apart = self._apart(ours, head_dim)
        return apart if self.axes is None else tuple(apart[axis] for axis in np.argsort(self.axes))

    def to_ours(self, variables: Sequence[np.ndarray], ours: tuple[int, ...]) -> np.ndarray:
        """The weight, of shape `ours`, from its variables."""
        parts = [array if self.axes is None else array.transpose(self.axes) for array in variables]
        return parts[0].reshape(ours) if len(parts) == 1 else np.concatenate(parts, -2)

    def from_ours(self, array: np.ndarray, head_dim: int) -> list[np.ndarray]:
        """The variables that hold a weight."""
        parts = np.split(array, len(self.variables), -2) if len(self.variables) > 1 else [array]
        apart = self._apart(array.shape, head_dim)
        order = range(len(apart)) if self.axes is None else np.argsort(self.axes)
        return [part.reshape(apart).transpose(order) for part in parts]

    def _apart(self, ours: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
        if self.variables[0][1] == "layer_scalar":
            return ()
        if self.heads is not None:
            heads = ours[self.heads] // head_dim
            return (*ours[: self.heads], heads, head_dim, *ours[self.heads + 1 :])
        if len(self.variables) > 1:
            return (*ours[:-2], ours[-2] // len(self.variables), ours[-1])
        return ours


def _scale(layer: str, **file: Any) -> KerasHubWeight:
    return KerasHubWeight(((layer, "scale", 0),), **file)


def _kernel(layer: str, **file: Any) -> KerasHubWeight:
    return KerasHubWeight(((layer, "kernel", 0),), (1, 0), **file)


def _heads_out(layer: str) -> KerasHubWeight:
    return KerasHubWeight(((layer, "kernel", 0),), (0, 2, 1), heads=0)  # [heads, in, head_dim]


# Ours → KerasHub's (read in keras-hub 0.32, gemma4_decoder_block.py and gemma4_backbone.py). In files, layers
# of the backbone are named by their class, and numbered where there are more.
KERAS_HUB_WEIGHTS = {
    "embed_tokens": KerasHubWeight(
        (("token_embedding", "embeddings", 0),), file_layer="reversible_embedding"
    ),
    "embed_tokens_per_layer": KerasHubWeight(
        (("per_layer_token_embedding", "embeddings", 0),), file_layer="embedding"
    ),
    "per_layer_model_projection": _kernel("per_layer_model_projection", file_layer="dense"),
    "per_layer_projection_norm": _scale("per_layer_projection_norm", file_layer="rms_normalization"),
    "norm": _scale("layer_norm", file_layer="rms_normalization"),  # the second one where there is the other
    "input_layernorm": _scale("pre_attention_norm"),
    "q_proj": _heads_out("attention/query_dense"),
    "q_norm": _scale("attention/query_norm"),
    "k_proj": _heads_out("attention/key_dense"),
    "k_norm": _scale("attention/key_norm"),
    "v_proj": _heads_out("attention/value_dense"),
    # [heads, head_dim, out]
    "o_proj": KerasHubWeight((("attention/output_dense", "kernel", 0),), (2, 0, 1), heads=1),
    "post_attention_layernorm": _scale("post_attention_norm"),
    "pre_feedforward_layernorm": _scale("pre_ffw_norm"),
    "gate_proj": _kernel("gating_ffw"),
    "up_proj": _kernel("gating_ffw_2"),
    "down_proj": _kernel("ffw_linear"),
    "post_feedforward_layernorm": _scale("post_ffw_norm"),
    "router_scale": KerasHubWeight((("moe_router", "per_dim_scale", 0),)),
    "router_proj": _kernel("moe_router/proj"),
    "router_per_expert_scale": KerasHubWeight((("moe_expert_bank", "per_expert_scale", 3),)),
    "experts_gate_up": KerasHubWeight(
        (("moe_expert_bank", "gate_proj", 0), ("moe_expert_bank", "up_proj", 1)), (0, 2, 1)
    ),
    "experts_down": KerasHubWeight((("moe_expert_bank", "down_proj", 2),), (0, 2, 1)),
    "post_feedforward_layernorm_1": _scale("post_ffw_norm_dense"),
    "pre_feedforward_layernorm_2": _scale("pre_ffw_norm_moe"),
    "post_feedforward_layernorm_2": _scale("post_ffw_norm_moe_path"),
    "per_layer_input_gate": _kernel("per_layer_input_gate"),
    "per_layer_projection": _kernel("per_layer_up_proj"),
    "post_per_layer_input_norm": _scale("post_per_layer_input_norm"),
    "layer_scalar": KerasHubWeight((("", "layer_scalar", 0),)),
}


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

    def peft_names(self, factor: str, prefix: str = TEXT_PREFIX) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index in the stack, PEFT's name) of each part of an adapter's `lora_a` or `lora_b`.

        Args:
            factor: Which.
            prefix: `TEXT_PREFIX`, or `WHOLE_PREFIX` for an adapter on a model with towers.
        """
        for index, name in self.hf_names():
            module = name.removesuffix(".weight")
            yield index, f"base_model.model.{prefix}{module}.{_PEFT_FACTORS[factor]}.weight"

    def gguf_name(self, index: tuple[int, ...]) -> str:
        """llama.cpp's name of one part."""
        name = GGUF_NAMES[self.role]
        return f"blk.{self.layers[index]}.{name}" if self.in_layers else name


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
                elif role in EXPERTS:
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


def peft_target_modules(roles: Iterable[str], prefix: str = TEXT_PREFIX) -> list[str] | str:
    """PEFT's `target_modules` for the matrices of `roles`.

    In a whole Gemma 4 the towers have modules of the same names, so there it is a regular expression that
    matches the text decoder's alone.
    """
    chosen = sorted(set(roles), key=list(LAYER_NAMES).index)
    if prefix == TEXT_PREFIX:
        return chosen
    modules = "|".join(re.escape(LAYER_NAMES[role].removesuffix(".weight")) for role in chosen)
    return rf"{re.escape(prefix)}layers\.\d+\.({modules})"


def lora_targets(config: Gemma4Config, targets: str | tuple[str, ...] = "all-linear") -> list[Weight]:
    """The stacked matrices that get adapters.

    Args:
        config: Of the model.
        targets: "all-linear", which means the seven projections, and roles, as a tuple or with commas
            between (`"q_proj,v_proj"`). Experts get adapters only where their roles are named
            (`"all-linear,experts_gate_up,experts_down"`).

    Raises:
        UserError: A role is not one of a layer's matrices.
    """
    names = [name.strip() for name in (targets.split(",") if isinstance(targets, str) else targets)]
    roles = {role for name in names for role in (ALL_LINEAR if name == "all-linear" else (name,))}
    known = [role for role in _MATRICES if config.hidden_size_per_layer_input or role in ALL_LINEAR]
    known += EXPERTS if config.num_experts else ()
    for role in sorted(roles):
        if role not in known:
            raise UserError(
                f"{role!r} is no matrix of this decoder's layers",
                where="lora.targets",
                remedy=f"use all-linear, or some of {', '.join(known)}, with commas between.",
            )
    return [weight for weight in table(config).values() if weight.in_layers and weight.role in roles]
