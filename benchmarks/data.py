"""Tokens a second from JSONL on disk to packed rows on disk, beside Hugging Face doing the same work.

    python benchmarks/data.py                 # two worker processes, about 20 million tokens
    python benchmarks/data.py --tokens 2000000 --workers 1 --skip-huggingface

Both sides read the JSONL, lay out the chat template, tokenize, make the loss mask, pack by best fit into rows
of 2,048 and write the rows; both are timed from start to end, processes and vocabulary included. That they
did the same work is checked: the same number of tokens and of trained tokens.

The text is gsm8k of ../shared with the published vocabulary where that folder is, else generated text with a
vocabulary trained on it. It is repeated to the length asked for, and in every copy two words in a hundred are
replaced by letters that no other copy has. That is harder than real text, where new words get rarer the more
is read, and matters because ours looks words up that it met before.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from keras_gemma_ft.data.files import hash_files
from keras_gemma_ft.data.packing import best_fit
from keras_gemma_ft.data.prepare import prepare
from keras_gemma_ft.data.readers import read
from keras_gemma_ft.data.shards import Recipe
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.export.chat_template import chat_template
from keras_gemma_ft.export.tokenizer import from_sentencepiece

LENGTH = 2048
FRESH_WORDS = 0.02
CHARACTERS_PER_TOKEN = 2.7
SHARED = Path(__file__).resolve().parents[2] / "shared"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=20_000_000, help="about how many tokens")
    arguments.add_argument("--workers", type=int, default=2, help="processes, on either side")
    arguments.add_argument("--skip-huggingface", action="store_true", help="measure ours alone")
    options = arguments.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # both sides use processes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vocabulary, pairs, text = inputs(folder)
        source = folder / "train.jsonl"
        write_source(source, pairs, options.tokens)
        result: dict[str, Any] = {
            "text": text,
            "bytes": source.stat().st_size,
            "workers": options.workers,
            "ours": ours(source, vocabulary, folder, options.workers),
        }
        if not options.skip_huggingface:
            result["huggingface"] = huggingface(source, vocabulary, folder, options.workers)
            for figure in ("tokens", "trained_tokens"):
                assert result["ours"][figure] == result["huggingface"][figure], f"{figure} differ"
            result["ratio"] = round(result["huggingface"]["seconds"] / result["ours"]["seconds"], 2)
    print(json.dumps(result, indent=2))


def ours(source: Path, vocabulary: Path, folder: Path, workers: int) -> dict[str, Any]:
    start = time.perf_counter()
    dataset = prepare(
        read(str(source)),
        folder / "ours",
        Tokenizer.from_file(vocabulary),
        Recipe(max_length=LENGTH),
        hash_files([str(source)]),
        workers=workers,
    )
    counts = dataset.manifest["counts"]
    return report(time.perf_counter() - start, counts["tokens"], counts["trained_tokens"], len(dataset))


def huggingface(source: Path, vocabulary: Path, folder: Path, workers: int) -> dict[str, Any]:
    """`datasets` with `tokenizers` and a compiled Jinja template, in batches; the packing is ours."""
    import datasets

    datasets.disable_progress_bars()
    path = folder / "tokenizer.json"
    from_sentencepiece(vocabulary.read_bytes()).save(str(path))
    start = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder / "cache")
    )
    rows = rows.map(
        huggingface_rows,
        fn_kwargs={"path": str(path)},
        batched=True,
        batch_size=5_000,
        num_proc=workers,
        remove_columns=rows.column_names,
    )
    rows.save_to_disk(str(folder / "huggingface"))
    seconds = time.perf_counter() - start
    tokens = trained = 0
    for batch in rows.with_format("numpy").iter(batch_size=500):
        tokens += int((batch["segment_ids"] > 0).sum())
        trained += int(batch["loss_mask"].sum())
    return report(seconds, tokens, trained, len(rows))


def huggingface_rows(batch: dict[str, list[Any]], path: str) -> dict[str, list[np.ndarray]]:
    template, tokenizer = huggingface_tools(path)
    texts = [template.render(messages=messages, bos_token="<bos>") for messages in batch["messages"]]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    examples = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
    header = np.asarray(tokenizer.encode("<|turn>model\n", add_special_tokens=False).ids)
    end = tokenizer.token_to_id("<turn|>")
    row_of = best_fit(np.asarray([len(example) for example in examples]), LENGTH)
    members: list[list[int]] = [[] for _ in range(int(row_of.max()) + 1)]
    for example, row in enumerate(row_of.tolist()):
        members[row].append(example)
    packed: dict[str, list[np.ndarray]] = {"token_ids": [], "segment_ids": [], "loss_mask": []}
    for row in members:
        token_ids = np.zeros(LENGTH, np.int32)
        segment_ids = np.zeros(LENGTH, np.uint16)
        loss_mask = np.zeros(LENGTH, bool)
        at = 0
        for segment, example in enumerate(row, 1):
            ids = examples[example]
            token_ids[at : at + len(ids)] = ids
            segment_ids[at : at + len(ids)] = segment
            ends = np.flatnonzero(ids == end)
            for turn in np.flatnonzero(ids == header[0]):
                if np.array_equal(ids[turn : turn + len(header)], header):
                    stop = ends[np.searchsorted(ends, turn)] + 1
                    loss_mask[at + turn + len(header) : at + stop] = True
            at += len(ids)
        for name, array in zip(packed, (token_ids, segment_ids, loss_mask), strict=True):
            packed[name].append(array)
    return packed


@lru_cache(maxsize=1)
def huggingface_tools(path: str) -> tuple[Any, Any]:
    """Template and tokenizer, once a process."""
    import jinja2
    import tokenizers

    return jinja2.Environment().from_string(chat_template("edge")), tokenizers.Tokenizer.from_file(path)


def report(seconds: float, tokens: int, trained: int, rows: int) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "trained_tokens": trained,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "packing_efficiency": round(tokens / (rows * LENGTH), 4),
    }


def inputs(folder: Path) -> tuple[Path, list[tuple[str, str]], str]:
    """A vocabulary, questions with answers, and what they are."""
    if SHARED.is_dir():
        lines = (SHARED / "datasets/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        pairs = [(row["question"], row["answer"]) for row in rows]
        return SHARED / "tokenizer/gemma4.model", pairs, "gsm8k, published vocabulary"
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubcdlmnrst", k=rng.randint(1, 9))) for _ in range(20_000)]

    def passage() -> str:
        """Words of which the n-th is met about 1/n as often as the first, as in real text."""
        return " ".join(words[int(len(words) ** rng.random()) - 1] for _ in range(rng.randint(10, 100)))

    pairs = [(passage() + "?", passage() + ".") for _ in range(7_000)]
    return train_vocabulary(folder, pairs), pairs, "generated text and vocabulary"


def train_vocabulary(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(question for question, _ in pairs), encoding="utf-8")
    markers = "<|turn> <turn|> <|channel> <channel|> <|think|> <|tool> <tool|> <|tool_call> <tool_call|> "
    markers += '<|tool_response> <tool_response|> <|"|>'
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=8_000,
        model_type="bpe",
        byte_fallback=True,
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
        user_defined_symbols=[*markers.split(), "\n", "\n\n", "▁▁", "▁▁▁"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def write_source(path: Path, pairs: list[tuple[str, str]], tokens: int) -> None:
    """Writes copies of the pairs until there are about so many tokens."""
    rng = random.Random(0)
    characters = 0
    with path.open("w", encoding="utf-8") as file:
        while characters < CHARACTERS_PER_TOKEN * tokens:
            for pair in pairs:
                question, answer = (freshen(text, rng) for text in pair)
                roles = ("user", "assistant")
                messages = [
                    {"role": role, "content": text}
                    for role, text in zip(roles, (question, answer), strict=True)
                ]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                characters += len(question) + len(answer)
                if characters >= CHARACTERS_PER_TOKEN * tokens:
                    return


def freshen(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for n in range(len(words)):
        if rng.random() < FRESH_WORDS:
            words[n] = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))
    return " ".join(words)


if __name__ == "__main__":
    main()
