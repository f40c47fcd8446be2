"""The shape of `gemma4_tiny`: a Gemma 4 of E2B's kind in miniature, 3.2 M parameters."""

from __future__ import annotations

from keras_gemma_ft.model.config import FULL, SLIDING, Gemma4Config


def tiny(vocabulary_size: int) -> Gemma4Config:
    """Six layers: two groups of a local and a global layer with K/V of their own, one that shares them.

    What costs time on a CPU is the width; what costs bytes alone are the two embeddings.
    """
    return Gemma4Config(
        vocab_size=vocabulary_size,
        hidden_size=160,
        intermediate_size=320,
        layer_types=(SLIDING, FULL) * 3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=vocabulary_size,
        sliding_window=32,
        max_position_embeddings=2048,
    )
