"""Trains the SentencePiece vocabulary of `gemma4_tiny` the way Gemma's is made.

    python -m pretrain.vocabulary DIRECTORY      # writes DIRECTORY/tokenizer.model in about a minute

BPE with byte fallback, split digits, no normalization, and no space put before a text. Gemma 4's control
tokens and runs of line breaks and spaces are pieces of their own; their ids are not the published ones.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import sentencepiece

from pretrain.corpus import documents

SIZE = 4096
DOCUMENTS = 120_000
MARKERS = (
    *("<mask>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    *('<|"|>', "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>"),
)
WHOLE = ["\n" * run for run in range(1, 5)] + ["▁" * run for run in (2, 3, 4, 8)]


def train(size: int = SIZE, count: int = DOCUMENTS) -> bytes:
    """The serialized model, trained on the first documents of the corpus."""
    texts = []
    for document in documents(0, count):
        if isinstance(document, str):
            texts += document.split("\n")
            continue
        for message in document:
            # A turn begins with its role, which must be one piece.
            texts += [message["role"], *message["content"].split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*MARKERS, *WHOLE],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        required_chars="".join(map(chr, range(33, 127))),
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.model").write_bytes(train())


if __name__ == "__main__":
    main()
