"""What every encoded conversation must fulfil before it may be trained on, read from its tokens alone.

The checker knows nothing of how ids and mask were made: it finds turns by their control tokens.

1. Exactly one `<bos>`, at the start.
2. Nothing is trained but what the model says: no header, no line break after a turn, no tool answer, nothing
   of another role.
3. Every trained span ends in `<turn|>`, or in the `<|tool_response>` with which the model hands over to a
   tool.
4. At least one token is trained.
"""

from __future__ import annotations

import numpy as np

from keras_gemma_ft.data.encoding import EncodedBatch
from keras_gemma_ft.data.tokenizer import Tokenizer

ONE_BOS = "it does not start with the one <bos>"
OTHERS_TRAINED = "tokens that the model does not say are trained"
OPEN_SPAN = "a trained span does not end in <turn|>"
NOTHING_TRAINED = "no token is trained: there is no model turn with content to learn"
RULES = (ONE_BOS, OTHERS_TRAINED, OPEN_SPAN, NOTHING_TRAINED)


class MaskContract:
    """Checks batches of one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bos = tokenizer.bos
        self._turn_start, self._turn_end = tokenizer.turn_start, tokenizer.turn_end
        self._handover = tokenizer.control.get("<|tool_response>", -1)
        self._answer_end = tokenizer.control.get("<tool_response|>", -1)
        self._header = np.asarray(tokenizer.encode("<|turn>model\n"), np.int32)

    def broken(self, batch: EncodedBatch, cut: np.ndarray | None = None) -> np.ndarray:
        """Which rule each conversation breaks first.

        Args:
            batch: The conversations; none is empty.
            cut: bool [conversations]; those that were cut at the right, whose last span may stay open.

        Returns:
            int64 [conversations]: an index into `RULES`, or -1 where all hold.
        """
        count = len(batch)
        ids, trained = batch.token_ids, batch.loss_mask
        starts, lasts = batch.offsets[:-1], batch.offsets[1:] - 1
        row_of = np.repeat(np.arange(count), batch.lengths)

        def per_row(tokens: np.ndarray) -> np.ndarray:
            return np.bincount(row_of[tokens], minlength=count)

        is_bos = ids == self._bos
        span_ends = trained.copy()
        span_ends[:-1] &= ~trained[1:]
        span_ends[lasts] = trained[lasts]
        if cut is not None:
            span_ends[lasts[cut]] = False
        open_ends = span_ends & (ids != self._turn_end) & (ids != self._handover)
        faults = np.stack(
            [
                ~is_bos[starts] | (per_row(is_bos) != 1),
                per_row(trained & ~self._said_by_model(ids, starts)) > 0,
                per_row(open_ends) > 0,
                per_row(trained) == 0,
            ]
        )
        return np.where(faults.any(axis=0), faults.argmax(axis=0), -1)

    def _said_by_model(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """bool [tokens]: what stands in model turns after the header, without tool answers."""
        turns = np.flatnonzero(ids == self._turn_start)
        headers = turns[turns + len(self._header) <= len(ids)]
        of_model = headers[(ids[headers[:, None] + np.arange(len(self._header))] == self._header).all(axis=1)]
        in_turn = _between(
            len(ids),
            begins=of_model + len(self._header),
            ends=[np.flatnonzero(ids == self._turn_end) + 1, turns, starts],
        )
        opened = np.flatnonzero(ids == self._handover)
        # The one that ends the calls is the model's own; that of a further answer follows an answer.
        further = ids[np.maximum(opened - 1, 0)] == self._answer_end
        in_answer = _between(
            len(ids),
            begins=opened + 1,
            ends=[np.flatnonzero(ids == self._answer_end) + 1, turns, starts],
        )
        in_answer[opened[further]] = True
        return in_turn & ~in_answer


def _between(size: int, begins: np.ndarray, ends: list[np.ndarray]) -> np.ndarray:
    """bool [size]: True from each begin up to the next end; where both are, the end counts."""
    state = np.full(size + 1, -1, np.int8)
    state[begins] = 1
    state[np.concatenate(ends)] = 0
    latest = np.maximum.accumulate(np.where(state >= 0, np.arange(size + 1), 0))
    return state[latest][:-1] > 0
