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
