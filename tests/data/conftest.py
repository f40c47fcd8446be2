"""A small vocabulary of Gemma's kind, made here, and the published one where it is at hand."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from keras_gemma_ft.data.tokenizer import Tokenizer

STRUCTURE = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>', "<mask>", "<|image|>"]
TOOLS = ["<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"]
WHOLE = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>", "</b>"]
WORDS = [
    "user",
    "model",
    "system",
    "thought",
    "call",
    "the",
    "bank",
    "card",
    "lost",
    "cancel",
    "thing",
    "singing",
]


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    rng = random.Random(1)
    lines = [" ".join(rng.choices(WORDS, k=12)) + rng.choice(".,:!?") for _ in range(300)]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*STRUCTURE, *TOOLS, *WHOLE],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(vocabulary_file: Path) -> Tokenizer:
    return Tokenizer.from_file(vocabulary_file)


@pytest.fixture(scope="session")
def real_tokenizer(shared: Path) -> Tokenizer:
    return Tokenizer.from_file(shared / "tokenizer" / "gemma4.model")


@pytest.fixture(scope="session")
def json_tokenizer(vocabulary_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The small vocabulary as a tokenizer.json."""
    from keras_gemma_ft.export.tokenizer import from_sentencepiece

    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    from_sentencepiece(vocabulary_file.read_bytes()).save(str(path))
    return Tokenizer.from_file(path)


@pytest.fixture(scope="session")
def random_text() -> Callable[[random.Random], str]:
    """Makes texts of words, spaces, line breaks, bytes, tags and spelled control tokens."""
    atoms = [
        *WORDS,
        " ",
        "  ",
        "   ",
        "     ",
        "\n",
        "\n\n",
        "\n" * 5,
        "\t",
        "1",
        "2024",
        "é",
        "你好",
        "😀",
        ">",
        " </",
    ]
    atoms += [
        "▁",
        "\0",
        "<b>",
        "</b>",
        "> </",
        "<",
        "|",
        "\u2028",
        "\r\n",
        "<bos>",
        "<|turn>",
        "<turn|>",
        "x",
    ]

    def make(rng: random.Random) -> str:
        return "".join(rng.choice(atoms) + rng.choice(["", " ", " "]) for _ in range(rng.randint(0, 30)))

    return make
