"""Scripts to token ids and loss masks, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_gemma_ft.data.script import STRUCTURE, TRAINED, Script
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.words import WordTable


@dataclass(slots=True)
class EncodedBatch:
    """Tokens of several conversations, one after the other.

    Attributes:
        token_ids: int32 [tokens].
        loss_mask: bool [tokens]; True where the token is a training target.
        offsets: int64 [conversations + 1]; conversation i is `token_ids[offsets[i]:offsets[i + 1]]`.
        neutralized: int64 [conversations]; control tokens that were spelled in the data.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    neutralized: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation, int64."""
        return np.diff(self.offsets)


class ScriptEncoder:
    """Encodes scripts with one vocabulary, and remembers the words it met.

    A control token spelled in a user's text is cut after its `<`. Both halves are encoded as ordinary text:
    the text survives to the letter, and no control token comes of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._words = WordTable(tokenizer)
        self._spelling = tokenizer.control_spelling

    def encode(self, scripts: Sequence[Script]) -> EncodedBatch:
        """Token ids of the scripts' texts, trained where the script says so."""
        words: list[str | None] = []
        word_counts: list[int] = []  # of each stretch
        flags: list[int] = []
        stretch_counts: list[int] = []  # of each script
        neutralized = np.zeros(len(scripts), np.int64)
        split = self._words.split
        for n, script in enumerate(scripts):
            for text, flag in zip(script.texts, script.flags, strict=True):
                if flag & STRUCTURE:
                    words.append(None if text == "<bos>" else text)
                    word_counts.append(1)
                    continue
                if "<" in text and self._spelling.search(text):
                    cut = self._cut(text)
                    neutralized[n] += len(cut) - 1
                    split_text = [word for part in cut for word in split(part)]
                else:
                    split_text = split(text)
                words += split_text
                word_counts.append(len(split_text))
            flags += script.flags
            stretch_counts.append(len(script.flags))
        token_ids, lengths = self._words.encode(words)
        stretch_lengths = _sums(lengths, word_counts)
        trained = (np.asarray(flags, np.int64) & TRAINED).astype(bool)
        offsets = np.zeros(len(scripts) + 1, np.int64)
        np.cumsum(_sums(stretch_lengths, stretch_counts), out=offsets[1:])
        return EncodedBatch(token_ids, np.repeat(trained, stretch_lengths), offsets, neutralized)

    def _cut(self, text: str) -> list[str]:
        """Cuts a text after the first character of each control token that it spells."""
        at = [match.start() + 1 for match in self._spelling.finditer(text)]
        return [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


def _sums(values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Sums of consecutive stretches of `values`, of which the i-th has `counts[i]` elements."""
    totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
    ends = np.cumsum(np.asarray(counts, np.int64))
    return np.diff(totals[np.concatenate([np.zeros(1, np.int64), ends])])
