"""A language model as evaluation sees it: answers to prompts, and losses of conversations in few shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from keras_gemma_ft.data.rows import Conversation

Batch = dict[str, np.ndarray]
_SHORTEST = 64


class EncodedConversation(Protocol):
    """What `data.template.encode` gives: int32 `[tokens]` and bool `[tokens]`, true on training targets."""

    @property
    def token_ids(self) -> np.ndarray: ...

    @property
    def loss_mask(self) -> np.ndarray: ...


class ModelView:
    """One view of a model, such as the tuned one or, with the adapter off, its base.

    Args:
        generate: `(prompts, max_new_tokens) → answers`, greedy.
        losses: Maps a batch (`token_ids`, `positions`, `segment_ids` int32 `[rows, length]`, `loss_mask` bool
            `[rows, length]`) to float `[rows]` summed losses in nats. Its memory is bounded by `batch_tokens`
            tokens, whatever the number of conversations.
        encode: Maps a conversation to its tokens and loss mask.
        batch_tokens: Rows × length of a batch at most, unless a single row is longer.
        view: A context within which the model is the one that is meant, for example with its adapter off.
    """

    def __init__(
        self,
        generate: Callable[[Sequence[Conversation], int], list[str]],
        losses: Callable[[Batch], np.ndarray],
        encode: Callable[[Conversation], EncodedConversation],
        *,
        batch_tokens: int = 8192,
        view: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._generate = generate
        self._losses = losses
        self._encode = encode
        self._batch_tokens = batch_tokens
        self._view = view

    def generate(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers to conversations that end where the model is to speak."""
        with self._view():
            return self._generate(prompts, max_new_tokens)

    def score(self, conversations: Sequence[Conversation]) -> tuple[np.ndarray, np.ndarray]:
        """Summed loss, float64 `[rows]`, and number of supervised tokens, int64 `[rows]`, per conversation.

        Rows of similar length share a batch, the longest first, so that a lack of memory shows at once.
        Lengths are padded to powers of two and batches to their full number of rows: a handful of shapes to
        compile.
        """
        encoded = [self._encode(conversation) for conversation in conversations]
        lengths = np.array([len(row.token_ids) for row in encoded])
        tokens = np.array([int(np.sum(row.loss_mask)) for row in encoded], np.int64)
        losses = np.zeros(len(encoded))
        padded = np.maximum(_SHORTEST, 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
        with self._view():
            for length in sorted(set(padded.tolist()), reverse=True):
                rows = max(1, self._batch_tokens // length)
                places = np.flatnonzero(padded == length)
                for start in range(0, len(places), rows):
                    chosen = places[start : start + rows]
                    batch = _batch([encoded[place] for place in chosen], rows, length)
                    losses[chosen] = np.asarray(self._losses(batch), np.float64)[: len(chosen)]
        return losses, tokens


def _batch(encoded: Sequence[EncodedConversation], rows: int, length: int) -> Batch:
    """One conversation a row; segment 0 and no target is padding, as in training."""
    batch = {
        "token_ids": np.zeros((rows, length), np.int32),
        "positions": np.zeros((rows, length), np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "loss_mask": np.zeros((rows, length), bool),
    }
    for row, one in enumerate(encoded):
        count = len(one.token_ids)
        batch["token_ids"][row, :count] = one.token_ids
        batch["positions"][row, :count] = np.arange(count)
        batch["segment_ids"][row, :count] = 1
        batch["loss_mask"][row, :count] = one.loss_mask
    return batch
