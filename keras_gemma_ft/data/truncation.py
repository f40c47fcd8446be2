"""Conversations that are longer than a row: dropped, shortened or split, and always counted.

- `drop`: left out.
- `truncate_right`: the first `max_length` tokens are kept. The last model turn may then lack its `<turn|>`.
- `truncate_left`: the oldest turns go until the rest fits; the system turn stays, and what is kept starts
  with a user turn. If the last question and answer alone are too long, the question loses its beginning. No
  model turn is ever cut.
- `split_turns`: the conversation becomes several, each with the system turn and as many whole exchanges
  (a user turn and what follows it) as fit. Later ones do not see the earlier ones.

What has nothing left to train is dropped under every policy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from keras_gemma_ft.data.encoding import EncodedBatch
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.words import ragged_arange

Policy = Literal["drop", "truncate_left", "truncate_right", "split_turns"]
POLICIES = get_args(Policy)

Piece = list[tuple[int, int]]
"""Stretches `(start, stop)` of a conversation's tokens that together make an example."""


@dataclass(slots=True)
class Truncated:
    """What is left of a batch.

    Attributes:
        batch: The examples, none longer than allowed.
        source: int64 [examples]; the conversation that each was made from, ascending.
        cut: bool [examples]; whether the last model turn lacks its end.
        counts: `dropped`, `truncated` and `split` conversations, `cut_model_turns` (model turns that lost
            their `<turn|>`) and `dropped_exchanges` (by `split_turns`, each too long for a row).
    """

    batch: EncodedBatch
    source: np.ndarray
    cut: np.ndarray
    counts: Counter[str]


class Truncation:
    """A policy for one length and vocabulary."""

    def __init__(self, policy: Policy, max_length: int, tokenizer: Tokenizer) -> None:
        self._max_length = max_length
        self._turn_start = tokenizer.turn_start
        self._stops = tokenizer.stop_ids
        self._user = np.asarray(tokenizer.encode("<|turn>user\n"), np.int32)
        self._system = np.asarray(tokenizer.encode("<|turn>system\n"), np.int32)
        self._turn_end_length = len(tokenizer.encode("<turn|>\n"))
        self._shorten = {
            "drop": self._drop,
            "truncate_left": self._left,
            "truncate_right": self._right,
            "split_turns": self._split,
        }[policy]

    def apply(self, batch: EncodedBatch) -> Truncated:
        """Shortens what is too long; returns the batch itself if nothing is."""
        too_long = batch.lengths > self._max_length
        if not too_long.any():
            return Truncated(batch, np.arange(len(batch)), np.zeros(len(batch), bool), Counter())
        counts: Counter[str] = Counter()
        source: list[int] = []
        cut: list[bool] = []
        lengths: list[int] = []
        starts: list[int] = []  # of stretches, in the whole batch
        sizes: list[int] = []
        for n, (start, stop) in enumerate(pairwise(batch.offsets.tolist())):
            pieces: list[Piece] = [[(0, stop - start)]]
            ids, mask = batch.token_ids[start:stop], batch.loss_mask[start:stop]
            if too_long[n]:
                whole = self._shorten(ids, mask, counts)
                pieces = [piece for piece in whole if any(mask[a:b].any() for a, b in piece)]
                counts["dropped" if not pieces else "split" if len(pieces) > 1 else "truncated"] += 1
            for piece in pieces:
                last = piece[-1][1] - 1
                is_cut = bool(too_long[n] and mask[last] and ids[last] not in self._stops)
                counts["cut_model_turns"] += is_cut
                source.append(n)
                cut.append(is_cut)
                lengths.append(sum(b - a for a, b in piece))
                starts += [start + a for a, _ in piece]
                sizes += [b - a for a, b in piece]
        tokens = ragged_arange(np.asarray(starts, np.int64), np.asarray(sizes, np.int64))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])
        kept = np.asarray(source, np.int64)
        shortened = EncodedBatch(
            batch.token_ids[tokens], batch.loss_mask[tokens], offsets, batch.neutralized[kept]
        )
        return Truncated(shortened, kept, np.asarray(cut, bool), +counts)

    def _drop(self, ids: np.ndarray, mask: np.ndarray, counts: Counter[str]) -> list[Piece]:
        return []

    def _right(self, ids: np.ndarray, mask: np.ndarray, counts: Counter[str]) -> list[Piece]:
        return [[(0, self._max_length)]]

    def _left(self, ids: np.ndarray, mask: np.ndarray, counts: Counter[str]) -> list[Piece]:
        head, questions = self._turns(ids)
        room = self._max_length - head
        asked = [turn for turn in questions if mask[turn:].any()]
        for turn in asked:
            if len(ids) - turn <= room:
                return [[(0, head), (turn, len(ids))]]
        if not asked or room <= 0:
            return []
        turn = asked[-1]
        content = turn + len(self._user)
        later = np.flatnonzero(ids[content:] == self._turn_start)
        content_end = content + int(later[0]) - self._turn_end_length
        resume = content + (len(ids) - turn) - room
        return [[(0, head), (turn, content), (resume, len(ids))]] if resume < content_end else []

    def _split(self, ids: np.ndarray, mask: np.ndarray, counts: Counter[str]) -> list[Piece]:
        head, questions = self._turns(ids)
        room = self._max_length - head
        borders = [head, *questions[1:], len(ids)]
        pieces: list[Piece] = []
        begin = head
        for start, stop in pairwise(borders):
            if stop - begin > room:
                if start > begin:
                    pieces.append([(0, head), (begin, start)])
                begin = start
            if stop - start > room:
                counts["dropped_exchanges"] += 1
                begin = stop
        if begin < len(ids):
            pieces.append([(0, head), (begin, len(ids))])
        return pieces

    def _turns(self, ids: np.ndarray) -> tuple[int, list[int]]:
        """Where `<bos>` and the system turn end, and where user turns begin."""
        turns = np.flatnonzero(ids == self._turn_start).tolist()
        if turns and self._has_header(ids, turns[0], self._system):
            head = turns[1] if len(turns) > 1 else len(ids)
        else:
            head = turns[0] if turns else len(ids)
        return head, [turn for turn in turns if self._has_header(ids, turn, self._user)]

    def _has_header(self, ids: np.ndarray, turn: int, header: np.ndarray) -> bool:
        return np.array_equal(ids[turn : turn + len(header)], header)
