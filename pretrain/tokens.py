"""The corpus as rows of tokens, made by several processes at once.

A row holds whole documents, one after the other, each beginning with `<bos>`; what is left is padding:

    <bos> a a a <eos> <bos> b b <turn|> \\n <pad> <pad>
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from keras_gemma_ft.data.encoding import ScriptEncoder
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.data.tokenizer import Tokenizer
from pretrain.corpus import Document, documents
from pretrain.exclusion import Exclusion
from pretrain.requests import Message

CHUNK = 10_000  # documents that a process makes at a time
# By whether the conversation has thoughts in it.
_TEMPLATES = {False: Template("edge"), True: Template("edge", enable_thinking=True)}

# What a worker process keeps from one chunk to the next.
_tokenizer: Tokenizer
_excluded: Exclusion


def encode_documents(made: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of documents, each with its `<bos>`; plain text ends with `<eos>`."""
    talks: list[list[Message]] = [document for document in made if isinstance(document, list)]
    scripts = [_TEMPLATES[any("reasoning" in m for m in talk)].script(talk) for talk in talks]
    batch = ScriptEncoder(tokenizer).encode(scripts)
    encoded = list(np.split(batch.token_ids, batch.offsets[1:-1]))
    texts = tokenizer.encode_batch([document for document in made if isinstance(document, str)])
    return encoded + [np.array([tokenizer.bos, *ids, tokenizer.eos], np.int32) for ids in texts]


def pack(encoded: Sequence[np.ndarray], length: int, pad: int) -> np.ndarray:
    """uint16 [rows, length]: the longest document that still fits comes next.

    Documents that are longer than a row are left out.
    """
    by_size: list[list[np.ndarray]] = [[] for _ in range(length + 1)]
    for ids in encoded:
        if len(ids) <= length:
            by_size[len(ids)].append(ids)
    rows = []
    while True:
        row = np.full(length, pad, np.uint16)
        used = 0
        for size in range(length, 0, -1):
            while by_size[size] and used + size <= length:
                row[used : used + size] = by_size[size].pop()
                used += size
        if not used:
            return np.array(rows, np.uint16).reshape(-1, length)
        rows.append(row)


def rows(
    vocabulary: Path, length: int, first: int, last: int, processes: int, excluded: Exclusion
) -> Iterator[np.ndarray]:
    """Rows of the documents from `first` to `last`, some thousands of documents at a time, in order."""
    # With "spawn" the workers do not inherit the accelerator.
    with multiprocessing.get_context("spawn").Pool(processes, _start, (vocabulary, excluded)) as pool:
        yield from pool.imap(partial(_rows, length), range(first, last, CHUNK))


def _start(vocabulary: Path, excluded: Exclusion) -> None:
    global _tokenizer, _excluded
    _tokenizer, _excluded = Tokenizer.from_file(vocabulary), excluded


def _rows(length: int, first: int) -> np.ndarray:
    made = list(documents(first, first + CHUNK, _excluded))
    return pack(encode_documents(made, _tokenizer), length, _tokenizer.pad)
