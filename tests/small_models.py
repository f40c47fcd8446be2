"""Small models of every kind of Gemma 4: their configurations, and files of them that transformers writes."""

import json
from pathlib import Path
from typing import Any

LOCAL, GLOBAL = "sliding_attention", "full_attention"

# The window is shorter than the tests' sequences, so that both kinds of attention differ.
COMMON = {
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 16,
    "head_dim": 8,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 48,
    "layer_types": [LOCAL, LOCAL, GLOBAL] * 2,
    "max_position_embeddings": 256,
    "model_type": "gemma4_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        GLOBAL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        LOCAL: {"rope_theta": 1e4, "rope_type": "default"},
    },
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "use_double_wide_mlp": False,
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
}
# A width of 4 would be ill-conditioned: where four gates are shut, the norm after them amplifies rounding, so
# that transformers in float32 is 2e-4 from itself in float64; with 16 it is 1e-6.
EDGE = {**COMMON, "hidden_size_per_layer_input": 16}
LARGE = {**COMMON, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
KINDS: dict[str, dict[str, Any]] = {
    "e2b": {
        **EDGE,
        "layer_types": [LOCAL, LOCAL, GLOBAL] * 3,
        "num_hidden_layers": 9,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    "e4b": {
        **EDGE,
        "layer_types": [LOCAL, GLOBAL] * 4,
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 4,
    },
    "31b": LARGE,
    "26b_a4b": {
        **LARGE,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}


def write_hf(target: Path, config: dict[str, Any]) -> None:
    """Writes a float32 HF directory with random weights, norms and scalars included."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=1.0 if weight.ndim == 1 else 0.0, std=0.2 if "embed" not in name else 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(target)
    # The published spelling of the configuration; transformers' own is another.
    published = {**config, "architectures": ["Gemma4ForCausalLM"], "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(published), encoding="utf-8")
