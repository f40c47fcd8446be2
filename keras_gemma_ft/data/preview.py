"""Rows as the loss sees them: every token with its text, its id, and whether it is a training target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from keras_gemma_ft.data.packing import PackedRows
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.shards import Recipe, ShardMaker
from keras_gemma_ft.data.tokenizer import SPACE, Tokenizer


@dataclass(frozen=True, slots=True)
class PreviewToken:
    """One token.

    Attributes:
        id: In the vocabulary.
        text: What it adds to the text; control tokens and single bytes as `<|turn>` and `<0xE4>`.
        trained: Whether it is a training target.
        control: Whether it is a control token.
    """

    id: int
    text: str
    trained: bool
    control: bool


@dataclass(frozen=True, slots=True)
class Preview:
    """An example, with the place it comes from.

    The question `Hi` answered with `Hello!` is (trained tokens underlined)

        <bos> <|turn> user ↵ Hi <turn|> ↵ <|turn> model ↵ Hello ! <turn|> ↵
                                                          ‾‾‾‾‾ ‾ ‾‾‾‾‾‾‾
    """

    origin: str
    tokens: tuple[PreviewToken, ...]

    @property
    def trained(self) -> int:
        """Number of tokens that are training targets."""
        return sum(token.trained for token in self.tokens)


class Previewer:
    """Makes previews by one recipe: encoded, shortened and checked by what prepares rows for training."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._maker = ShardMaker(tokenizer, replace(recipe, packing=False))
        self._pieces = tokenizer.pieces
        self._control = frozenset(tokenizer.control.values())

    def of(self, conversation: Conversation) -> list[Preview]:
        """The examples that a conversation becomes: one; none if it is left out; several if it is split."""
        rows, _, _ = self._maker.rows([conversation])
        return [Preview(conversation.origin, tuple(tokens)) for tokens in self._tokens(rows)]

    def _tokens(self, rows: PackedRows) -> Iterator[list[PreviewToken]]:
        for ids, segments, mask in zip(rows.token_ids, rows.segment_ids, rows.loss_mask, strict=True):
            length = int(np.count_nonzero(segments))
            yield [
                PreviewToken(i, self._pieces[i].replace(SPACE, " "), trained, i in self._control)
                for i, trained in zip(ids[:length].tolist(), mask[:length].tolist(), strict=True)
            ]
