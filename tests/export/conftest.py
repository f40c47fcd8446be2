"""Small presets of every kind of Gemma 4, made by transformers, with a vocabulary trained here."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

MARKERS = ["<mask>", "<|tool>", "<tool|>", "<|tool_response>", "<|turn>", "<turn|>", '<|"|>']
WHOLE = ["\n", "\n\n", "▁▁", "▁▁▁▁", "<b>", "</b>"]
LOCAL, GLOBAL = "sliding_attention", "full_attention"

# The window is shorter than the prompts, so that both kinds of attention differ.
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
}
EDGE = {
    **COMMON,
    "hidden_size_per_layer_input": 4,
    "layer_types": [LOCAL, LOCAL, GLOBAL] * 3,
    "num_hidden_layers": 9,
    "num_kv_shared_layers": 3,
}
LARGE = {**COMMON, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
KINDS: dict[str, dict[str, Any]] = {
    "e2b": {**EDGE, "num_key_value_heads": 1, "use_double_wide_mlp": True},
    "e4b": EDGE,
    "31b": LARGE,
    "26b_a4b": {
        **LARGE,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece vocabulary of some hundred pieces, trained here the way Gemma's was."""
    folder = tmp_path_factory.mktemp("vocabulary")
    rng = random.Random(1)
    words = [
        "the",
        "bathe",
        "banana",
        "bandana",
        "sing",
        "singing",
        "thing",
        "nothing",
        "annal",
        "abbey",
        "x1",
        "2024",
    ]
    text = "\n".join(" ".join(rng.choices(words, k=9)) + "," * rng.randint(0, 2) for _ in range(500))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=MARKERS + WHOLE,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return (folder / "small.model").read_bytes()


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory, small_model: bytes) -> Callable[[str], Path]:
    """Gives, for a kind, a float32 HF directory that transformers wrote, with random norms and scalars."""
    folder = tmp_path_factory.mktemp("presets")

    def make(kind: str) -> Path:
        target = folder / kind
        if not target.exists():
            _write_preset(target, KINDS[kind], small_model)
        return target

    return make


def _write_preset(target: Path, config: dict[str, Any], vocabulary: bytes) -> None:
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    size = sentencepiece.SentencePieceProcessor(model_proto=vocabulary).get_piece_size()
    config = {**config, "vocab_size": size, "vocab_size_per_layer_input": size}
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
    (target / "tokenizer.model").write_bytes(vocabulary)
