"""The shape of a Gemma 4 text decoder, read from Hugging Face's and KerasHub's spellings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_gemma_ft.errors import UserError

SLIDING, FULL = "sliding_attention", "full_attention"
# What a KerasHub backbone can be asked for and no published text decoder is: field to what it must be.
_NOT_OF_KERAS_HUB = {
    "attention_logit_soft_cap": None,
    "global_rope_scaling_factor": 1.0,
    "is_embedding_model": False,
    "local_rope_scaling_factor": 1.0,
    "use_bidirectional_attention": False,
    "use_sliding_window_attention": True,
}


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one of the (at most four) kinds of decoder layer looks like.

    Attributes:
        name: `stage/span`: `own/local`, `own/global`, `shared/local`, `shared/global`.
        head_dim: Width of one head.
        num_kv_heads: Key/value heads.
        window: Number of positions a token sees, itself included; `None` for all.
        owns_kv: Whether the layer computes keys and values (else it reuses an earlier layer's).
        k_eq_v: Whether values are the key projection's output.
        intermediate_size: Width of the dense feed-forward.
        rope_theta: Base wavelength of the rotary embedding.
        rotary_fraction: Share of the head dimension's frequencies that rotate.
    """

    name: str
    head_dim: int
    num_kv_heads: int
    window: int | None
    owns_kv: bool
    k_eq_v: bool
    intermediate_size: int
    rope_theta: float
    rotary_fraction: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of layers with equal weights' shapes: `groups` times (`locals_per_group` local, one global).

    Attributes:
        name: `own` (layers that compute K/V) or `shared` (layers that reuse them).
        first_layer: Index of its first layer in the whole decoder.
        groups: Repeats of the block that `lax.scan` runs over.
        locals_per_group: Sliding-window layers before each global layer.
    """

    name: str
    first_layer: int
    groups: int
    locals_per_group: int

    def layer_index(self, group: int, local: int | None) -> int:
        """Index in the whole decoder of a local layer, or of the group's global layer (`local=None`)."""
        within = self.locals_per_group if local is None else local
        return self.first_layer + group * (self.locals_per_group + 1) + within


@dataclasses.dataclass(frozen=True)
class Gemma4Config:
    """A Gemma 4 text decoder; names follow Hugging Face's `Gemma4TextConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    sliding_window: int = 512
    local_rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0
    global_rotary_fraction: float = 0.25
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = 30.0
    max_position_embeddings: int = 131_072
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

    def __post_init__(self) -> None:
        self.stages  # noqa: B018  (raises for a layout that the scan cannot run)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def embedding_scale(self) -> float:
        return float(self.hidden_size) ** 0.5

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order.

        Raises:
            UserError: The layers are no whole number of equal groups that end in a global layer.
        """
        own = self.num_hidden_layers - self.num_kv_shared_layers
        spans = [("own", 0, own)]
        if self.num_kv_shared_layers:
            spans.append(("shared", own, self.num_hidden_layers))
        stages = []
        for name, start, stop in spans:
            types = self.layer_types[start:stop]
            groups = types.count(FULL)
            period = len(types) // max(groups, 1)
            if not groups or types != ((SLIDING,) * (period - 1) + (FULL,)) * groups:
                raise UserError(
                    f"the {name}-KV layers {list(types)} are no equal groups that end in a full layer",
                    where="config.json: layer_types, num_kv_shared_layers",
                    remedy="Gemma 4's published layouts are; check that this is a text decoder's file.",
                )
            stages.append(Stage(name, start, groups, period - 1))
        return tuple(stages)

    def kind(self, stage: str, span: str) -> LayerKind:
        """The kind of layer at `stage` (`own`, `shared`) and `span` (`local`, `global`)."""
        is_global = span == "global"
        k_eq_v = is_global and self.attention_k_eq_v
        global_kv = self.num_global_key_value_heads if k_eq_v else None
        wide = 2 if self.use_double_wide_mlp and stage == "shared" else 1
        return LayerKind(
            name=f"{stage}/{span}",
            head_dim=self.global_head_dim if is_global else self.head_dim,
            num_kv_heads=(global_kv if is_global else None) or self.num_key_value_heads,
            window=None if is_global else self.sliding_window,
            owns_kv=stage == "own",
            k_eq_v=k_eq_v,
            intermediate_size=self.intermediate_size * wide,
            rope_theta=self.global_rope_theta if is_global else self.local_rope_theta,
            rotary_fraction=self.global_rotary_fraction if is_global else 1.0,
        )

    @property
    def variant(self) -> str:
        """Which published chat template applies: `edge` (E2B, E4B: per-layer embeddings) or `large`."""
        return "edge" if self.hidden_size_per_layer_input else "large"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gemma4Config:
        """Reads a Hugging Face `config.json` (the whole model's or that of the text model alone).

        Both spellings of the global layers' shape are read: `global_head_dim` with
        `num_global_key_value_heads`, and the newer `per_layer_config`.

        Raises:
            UserError: It is no causal Gemma 4's configuration, or a field is missing or wrong.
        """
        text = dict(config.get("text_config") or config)
        if not str(text.get("model_type", "")).startswith("gemma4"):
            raise UserError(
                f"model_type is {text.get('model_type')!r}, not a Gemma 4",
                where="config.json",
                remedy="give a preset of Gemma 4: E2B, E4B, 26B-A4B, 31B or the embedded gemma4_tiny.",
            )
        if text.get("use_bidirectional_attention") == "all":
            raise UserError(
                "use_bidirectional_attention is 'all': it is no causal model",
                where="config.json",
                remedy="give a preset of Gemma 4: E2B, E4B, 26B-A4B, 31B or the embedded gemma4_tiny.",
            )
        try:
            num_layers = text["num_hidden_layers"]
            layer_types = tuple(text.get("layer_types") or ())
            if len(layer_types) != num_layers:
                period = 6
                layer_types = tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))
            if "per_layer_config" in text:
                of_global = {
                    "head_dim": text["head_dim"],
                    **_global_layers(text["per_layer_config"], layer_types),
                }
            else:
                of_global = {
                    "head_dim": text.get("global_head_dim", 512),
                    "num_key_value_heads": text.get("num_global_key_value_heads"),
                }
            k_eq_v = bool(text.get("attention_k_eq_v"))
            rope = text.get("rope_parameters") or {}
            full_rope, local_rope = rope.get(FULL) or {}, rope.get(SLIDING) or {}
            moe = bool(text.get("enable_moe_block"))
            return cls(
                vocab_size=text["vocab_size"],
                hidden_size=text["hidden_size"],
                intermediate_size=text["intermediate_size"],
                layer_types=layer_types,
                num_attention_heads=text["num_attention_heads"],
                num_key_value_heads=text["num_key_value_heads"],
                head_dim=text["head_dim"],
                global_head_dim=of_global["head_dim"],
                num_global_key_value_heads=of_global.get("num_key_value_heads") if k_eq_v else None,
                attention_k_eq_v=k_eq_v,
                num_kv_shared_layers=text.get("num_kv_shared_layers") or 0,
                use_double_wide_mlp=bool(text.get("use_double_wide_mlp")),
                hidden_size_per_layer_input=text.get("hidden_size_per_layer_input") or 0,
                vocab_size_per_layer_input=text.get("vocab_size_per_layer_input") or text["vocab_size"],
                sliding_window=text["sliding_window"],
                local_rope_theta=float(local_rope.get("rope_theta", 10_000.0)),
                global_rope_theta=float(full_rope.get("rope_theta", 1_000_000.0)),
                global_rotary_fraction=float(full_rope.get("partial_rotary_factor", 0.25)),
                rms_norm_eps=text.get("rms_norm_eps", 1e-6),
                final_logit_softcapping=text.get("final_logit_softcapping"),
                max_position_embeddings=text.get("max_position_embeddings", 131_072),
                num_experts=(text.get("num_experts") or 0) if moe else 0,
                top_k_experts=(text.get("top_k_experts") or 0) if moe else 0,
                moe_intermediate_size=(text.get("moe_intermediate_size") or 0) if moe else 0,
                pad_token_id=_first(text.get("pad_token_id"), 0),
                eos_token_id=_first(text.get("eos_token_id"), 1),
                bos_token_id=_first(text.get("bos_token_id"), 2),
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the field {error} is missing or wrong",
                where="config.json",
                remedy="use the config.json that was published with the weights.",
            ) from error

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a text-only `Gemma4ForCausalLM`, complete where defaults would be wrong."""
        moe = self.num_experts > 0
        config: dict[str, Any] = {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attention_k_eq_v": self.attention_k_eq_v,
            "bos_token_id": self.bos_token_id,
            "enable_moe_block": moe,
            "eos_token_id": self.eos_token_id,
            "final_logit_softcapping": self.final_logit_softcapping,
            "global_head_dim": self.global_head_dim,
            "head_dim": self.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": self.hidden_size,
            "hidden_size_per_layer_input": self.hidden_size_per_layer_input,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_global_key_value_heads": self.num_global_key_value_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_kv_shared_layers": self.num_kv_shared_layers,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {
                FULL: {
                    "partial_rotary_factor": self.global_rotary_fraction,
                    "rope_theta": self.global_rope_theta,
                    "rope_type": "proportional",
                },
                SLIDING: {"rope_theta": self.local_rope_theta, "rope_type": "default"},
            },
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": True,
            "use_bidirectional_attention": None,
            "use_cache": True,
            "use_double_wide_mlp": self.use_double_wide_mlp,
            "vocab_size": self.vocab_size,
            "vocab_size_per_layer_input": self.vocab_size_per_layer_input or self.vocab_size,
        }
        if moe:
            config |= {
                "num_experts": self.num_experts,
                "top_k_experts": self.top_k_experts,
                "moe_intermediate_size": self.moe_intermediate_size,
            }
        return config

    @classmethod
    def from_keras_hub(cls, config: Mapping[str, Any]) -> Gemma4Config:
        """Reads the `get_config()` of a KerasHub `Gemma4Backbone`.

        Raises:
            UserError: A field is missing, or asks for what no published Gemma 4 text decoder does.
        """
        for field, neutral in _NOT_OF_KERAS_HUB.items():
            if config.get(field, neutral) != neutral:
                raise UserError(
                    f"{field}={config[field]!r} is not supported",
                    where="config.json of the KerasHub preset",
                    remedy="give a preset of one of Gemma 4's published text decoders.",
                )
        try:
            num_layers = config["num_layers"]
            period = config.get("sliding_window_pattern", 6)
            layer_types = config.get("layer_types") or [
                FULL if (i + 1) % period == 0 else SLIDING for i in range(num_layers)
            ]
            moe = bool(config.get("enable_moe_block"))
            global_kv = config.get("num_global_key_value_heads")
            return cls(
                vocab_size=config["vocabulary_size"],
                hidden_size=config["hidden_dim"],
                intermediate_size=config["intermediate_dim"],
                layer_types=tuple(layer_types),
                num_attention_heads=config["num_query_heads"],
                num_key_value_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                global_head_dim=config.get("global_head_dim") or config["head_dim"],
                # KerasHub switches K = V by this field being set (keras-hub 0.32, gemma4_backbone.py).
                num_global_key_value_heads=global_kv,
                attention_k_eq_v=global_kv is not None,
                num_kv_shared_layers=config.get("num_kv_shared_layers") or 0,
                use_double_wide_mlp=bool(config.get("use_double_wide_mlp")),
                hidden_size_per_layer_input=config.get("hidden_size_per_layer_input") or 0,
                vocab_size_per_layer_input=config.get("vocab_size_per_layer_input")
                or config["vocabulary_size"],
                sliding_window=config.get("sliding_window_size", 512),
                local_rope_theta=config.get("local_rope_wavelength") or 10_000.0,
                global_rope_theta=config.get("global_rope_wavelength") or 1_000_000.0,
                global_rotary_fraction=config.get("global_rope_partial_rotary_factor", 1.0),
                rms_norm_eps=config.get("layer_norm_epsilon", 1e-6),
                final_logit_softcapping=config.get("final_logit_soft_cap"),
                num_experts=config["num_experts"] if moe else 0,
                top_k_experts=config.get("num_experts_per_token", 8) if moe else 0,
                moe_intermediate_size=config["expert_intermediate_dim"] if moe else 0,
            )
        except KeyError as error:
            raise UserError(
                f"the field {error} is missing",
                where="config.json of the KerasHub preset",
                remedy="use the config.json that was saved with the weights.",
            ) from error

    def to_keras_hub(self) -> dict[str, Any]:
        """Keyword arguments of a text-only KerasHub `Gemma4Backbone`."""
        return {
            "vocabulary_size": self.vocab_size,
            "image_size": None,
            "num_layers": self.num_hidden_layers,
            "num_query_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "hidden_dim": self.hidden_size,
            "intermediate_dim": self.intermediate_size,
            "head_dim": self.head_dim,
            "final_logit_soft_cap": self.final_logit_softcapping,
            "sliding_window_size": self.sliding_window,
            "sliding_window_pattern": self.stages[0].locals_per_group + 1,
            "layer_types": list(self.layer_types),
            "global_head_dim": self.global_head_dim,
            "layer_norm_epsilon": self.rms_norm_eps,
            "num_kv_shared_layers": self.num_kv_shared_layers,
            "num_global_key_value_heads": self.num_global_key_value_heads,
            "hidden_size_per_layer_input": self.hidden_size_per_layer_input,
            "vocab_size_per_layer_input": self.vocab_size_per_layer_input or None,
            "global_rope_wavelength": self.global_rope_theta,
            "local_rope_wavelength": self.local_rope_theta,
            "global_rope_partial_rotary_factor": self.global_rotary_fraction,
            "use_double_wide_mlp": self.use_double_wide_mlp,
            "enable_moe_block": self.num_experts > 0,
            "num_experts": self.num_experts or None,
            "expert_intermediate_dim": self.moe_intermediate_size or None,
            "num_experts_per_token": self.top_k_experts or 8,
        }


def _global_layers(per_layer: Mapping[str, Any], layer_types: tuple[str, ...]) -> dict[str, Any]:
    """What `per_layer_config` says of the global layers: transformers' spelling since 5.23.

    Its keys are layer numbers, with zeros in front where there are ten layers and more ("05", "11").

    Raises:
        UserError: It sets local layers apart, or global layers from each other.
    """
    by_layer = {int(number): override for number, override in per_layer.items()}
    globals_ = [index for index, kind in enumerate(layer_types) if kind == FULL]
    override = dict(by_layer.get(globals_[0], {})) if globals_ else {}
    if by_layer != dict.fromkeys(globals_, override):
        raise UserError(
            "layers of one kind differ from each other",
            where="config.json: per_layer_config",
            remedy="Gemma 4's published layers do not; check that this is a text decoder's file.",
        )
    return override


def _first(value: int | list[int] | None, default: int) -> int:
    """A token id that may be published as one number, as a list of stop ids, or not at all."""
    if isinstance(value, list):
        return value[0] if value else default
    return default if value is None else value
