"""Encodes words once: exactly the ids of encoding whole texts, at several times the speed.

Gemma's vocabulary has next to no piece that reaches over a space or a line break, and merges make nothing
but pieces. So a text may be cut before every space and around every line break, and the ids of its words,
put together, are the ids of the text. Most words of a corpus were met before, so that encoding becomes
looking up.

    "Hi there\\nyou"  ->  "Hi", " there", "\\n", "you"

What cannot be cut safely (a piece such as `>▁</`, which does reach over a space; more spaces in a row than
the vocabulary has pieces for) is encoded whole. A vocabulary that does more to a text than merge pieces is
not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from keras_gemma_ft.data.tokenizer import SPACE, Tokenizer

# Words and ids kept before starting over, and the longest word worth keeping, in characters: together they
# bound the table to some 200 MB, and texts without spaces (Chinese) do not flood it.
_MOST_WORDS = 500_000
_MOST_IDS = 4_000_000
_LONGEST_WORD = 64
# More joining pieces than this, and the vocabulary is not of Gemma's kind.
_MOST_JOINERS = 32


class WordTable:
    """Ids of every word met so far, in one flat array.

    Attributes:
        token_ids: Ids of all words, one after the other, int32.
        starts, lengths: Where in `token_ids` each word begins, and how many ids it has, int64.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cuts = _cuts(tokenizer)
        self._clear()

    def _clear(self) -> None:
        self._index: dict[str | None, int] = {}
        self.token_ids = np.zeros(0, np.int32)
        self.starts = np.zeros(0, np.int64)
        self.lengths = np.zeros(0, np.int64)
        self._add([None], [[self._tokenizer.bos]])

    def split(self, text: str) -> list[str]:
        """Cuts a text into words whose ids together are the ids of the text."""
        return self._cuts.split(text)

    def encode(self, words: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of words; None is `<bos>`, which SentencePiece reads in no text.

        Returns:
            `(token_ids, lengths)`: int32 ids of all words in order, and int64 number of ids of each word.
        """
        indices = self._look_up(words)
        starts, lengths = self.starts[indices], self.lengths[indices]
        return self.token_ids[ragged_arange(starts, lengths)], lengths

    def _look_up(self, words: Sequence[str | None]) -> np.ndarray:
        if len(self.starts) > _MOST_WORDS or len(self.token_ids) > _MOST_IDS:
            self._clear()
        unseen = set(words)
        unseen.difference_update(self._index)
        if unseen:
            novel = [word for word in unseen if word is not None]
            self._add(novel, self._tokenizer.encode_batch(novel))
        indices = np.fromiter(map(self._index.__getitem__, words), np.int64, len(words))
        for word in unseen:
            if word is not None and len(word) > _LONGEST_WORD:
                del self._index[word]  # its ids stay until the table is cleared
        return indices

    def _add(self, words: Sequence[str | None], encoded: list[list[int]]) -> None:
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        flat = np.fromiter((i for ids in encoded for i in ids), np.int32, int(lengths.sum()))
        starts = len(self.token_ids) + np.cumsum(lengths) - lengths
        self._index.update(zip(words, range(len(self.starts), len(self.starts) + len(words)), strict=True))
        self.token_ids = np.concatenate([self.token_ids, flat])
        self.starts = np.concatenate([self.starts, starts])
        self.lengths = np.concatenate([self.lengths, lengths])


def ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Counts up from every start: `starts=[5, 0], lengths=[3, 2]` gives `[5, 6, 7, 0, 1]`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


class _Cuts:
    """Where a text may be cut, for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._joiners = _pieces_over_a_cut(tokenizer.pieces)
        self._possible = tokenizer.backend.splits_at_spaces and len(self._joiners) <= _MOST_JOINERS
        self._joining = re.compile("|".join(map(re.escape, self._joiners))) if self._joiners else None
        longest_run = 1
        while SPACE * (longest_run + 1) in tokenizer.backend.whole_pieces:
            longest_run += 1
        self._too_long_run = " " * (longest_run + 1)

    def split(self, text: str) -> list[str]:
        whole = (
            not self._possible
            or SPACE in text
            or self._too_long_run in text
            or (self._joining is not None and self._joining.search(text))
        )
        if whole:
            return [text]
        if "  " in text or "\n\n" in text or "\0" in text:
            return _WORD.findall(text)
        # Twice as fast as the regular expression; it leaves some empty words, which have no ids.
        return text.replace(" ", "\0 ").replace("\n", "\0\n\0").split("\0")


@lru_cache(maxsize=8)
def _cuts(tokenizer: Tokenizer) -> _Cuts:
    return _Cuts(tokenizer)


_WORD = re.compile(r" {2,}|\n+| [^ \n]*|[^ \n]+")


def _pieces_over_a_cut(pieces: Iterable[str]) -> list[str]:
    """Pieces, as text, that a cut before a space or around line breaks would tear; runs are not torn."""
    torn = []
    for piece in pieces:
        text = piece.replace(SPACE, " ")
        over_space = " " in text[1:] and text.strip(" ")
        over_line = "\n" in text and text.strip("\n")
        if over_space or over_line:
            torn.append(text)
    return torn
