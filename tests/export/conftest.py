"""Small presets of every kind of Gemma 4, made by transformers, with a vocabulary trained here."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from small_models import KINDS, write_hf

MARKERS = ["<mask>", "<|tool>", "<tool|>", "<|tool_response>", "<|turn>", "<turn|>", '<|"|>']
WHOLE = ["\n", "\n\n", "▁▁", "▁▁▁▁", "<b>", "</b>"]


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
    size = sentencepiece.SentencePieceProcessor(model_proto=vocabulary).get_piece_size()
    write_hf(target, {**config, "vocab_size": size, "vocab_size_per_layer_input": size})
    (target / "tokenizer.model").write_bytes(vocabulary)


@pytest.fixture(scope="session")
def whole(preset: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with towers whose text decoder is the preset of kind e2b."""
    import torch
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration

    text = Gemma4ForCausalLM.from_pretrained(preset("e2b"))
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = {**sizes, "head_dim": 8, "intermediate_size": 24, "num_key_value_heads": 2}
    audio = {**sizes, "output_proj_dims": 16, "subsampling_conv_channels": [4, 4]}
    config = Gemma4Config(
        text_config=text.config.to_dict(),
        vision_config={**vision, "global_head_dim": 8},
        audio_config=audio,
        image_token_id=360,
        audio_token_id=361,
    )
    torch.manual_seed(1)
    model = Gemma4ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    target = tmp_path_factory.mktemp("whole") / "preset"
    model.save_pretrained(target)
    (target / "tokenizer.model").write_bytes((preset("e2b") / "tokenizer.model").read_bytes())
    return target
