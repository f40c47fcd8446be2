"""Several examples in one row: fewer rows, no padding to speak of.

Rows of 8 tokens from examples of 5, 4, 3 and 2 tokens:

    token_ids    [[ 2 11 12 13 14  2 31 32]      example 0, then example 2
                  [ 2 21 22 23  2 41  0  0]]     example 1, then example 3, then padding
    segment_ids  [[ 1  1  1  1  1  2  2  2]
                  [ 1  1  1  1  2  2  0  0]]
    positions    [[ 0  1  2  3  4  0  1  2]
                  [ 0  1  2  3  0  1  0  0]]

The first token of a segment is never a training target: it would be predicted from another example.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_gemma_ft.data.encoding import EncodedBatch
from keras_gemma_ft.data.words import ragged_arange

PAD = 0
"""Id that fills rows. The model never looks at it (segment 0), so it is the same for every vocabulary."""


@dataclass(slots=True)
class PackedRows:
    """Rows of one length.

    Attributes:
        token_ids: int32 [rows, length], 0 where padded.
        segment_ids: uint16 [rows, length]; 0 is padding, examples count from 1.
        loss_mask: bool [rows, length], aligned with `token_ids`.
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    loss_mask: np.ndarray


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: which row each example goes into.

    Examples are placed longest first (ties in order), each into the row with the least room that still holds
    it (ties: the row that was filled last), else into a new row. At most 11/9 of the fewest possible rows,
    plus one (Johnson, "Near-optimal bin packing algorithms", 1973); on real lengths, next to none too many.

    `best_fit_reference` says the same plainly. Here examples of one length are placed together, and rows are
    found by a bit set of the room they have left.

    Args:
        lengths: int [examples], each between 1 and `capacity`.
        capacity: Tokens of a row.

    Returns:
        int64 [examples]: the row of each, from 0.
    """
    lengths = _checked(lengths, capacity)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    row_of_place = np.empty(len(lengths), np.int64)  # by place in `order`
    with_room: dict[int, list[int]] = {}  # room left -> rows, in the order they were filled
    rooms = 0  # bit set of the keys of with_room
    rows = 0
    place = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                candidates = with_room[room]
                row = candidates.pop()
                if not candidates:
                    del with_room[room]
                    rooms &= ~(1 << room)
            else:
                row, room = rows, capacity
                rows += 1
            # What goes in first leaves this row the fullest, so the next equal example goes in, too.
            placed = min(count, room // size)
            row_of_place[place : place + placed] = row
            place += placed
            count -= placed
            left = room - placed * size
            if left:
                if left not in with_room:
                    with_room[left] = []
                    rooms |= 1 << left
                with_room[left].append(row)
    row_of = np.empty(len(lengths), np.int64)
    row_of[order] = row_of_place
    return row_of


def best_fit_reference(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """`best_fit`, one example at a time: what it is tested against."""
    lengths = _checked(lengths, capacity)
    row_of = np.empty(len(lengths), np.int64)
    room: list[int] = []
    filled_at: list[int] = []
    for time, example in enumerate(np.argsort(-lengths, kind="stable")):
        size = int(lengths[example])
        fitting = [row for row in range(len(room)) if room[row] >= size]
        if fitting:
            row = min(fitting, key=lambda row: (room[row], -filled_at[row]))
        else:
            row = len(room)
            room.append(capacity)
            filled_at.append(time)
        room[row] -= size
        filled_at[row] = time
        row_of[example] = row
    return row_of


def fill_rows(batch: EncodedBatch, row_of: np.ndarray, length: int) -> PackedRows:
    """Puts examples into rows; inside a row they keep their order.

    Args:
        batch: The examples.
        row_of: int64 [examples]; the row of each. `np.arange(len(batch))` gives every example its own row.
        length: Tokens of a row.
    """
    order = np.argsort(row_of, kind="stable")
    rows, lengths = row_of[order], batch.lengths[order]
    opens_row = np.diff(rows, prepend=-1) != 0
    first_of_row = np.flatnonzero(opens_row)[np.cumsum(opens_row) - 1]  # place in `order`
    before = np.cumsum(lengths) - lengths
    segments = np.arange(len(order)) - first_of_row + 1
    if segments.max(initial=0) > np.iinfo(np.uint16).max:
        raise ValueError(f"a row holds {segments.max()} examples; segment ids are 16 bits wide")
    source = ragged_arange(batch.offsets[:-1][order], lengths)
    target = ragged_arange(rows * length + before - before[first_of_row], lengths)
    shape = (int(rows[-1]) + 1, length) if len(rows) else (0, length)
    packed = PackedRows(np.full(shape, PAD, np.int32), np.zeros(shape, np.uint16), np.zeros(shape, bool))
    packed.token_ids.reshape(-1)[target] = batch.token_ids[source]
    packed.segment_ids.reshape(-1)[target] = np.repeat(segments, lengths)
    packed.loss_mask.reshape(-1)[target] = batch.loss_mask[source]
    return packed


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Positions that restart in every segment, 0 in padding: int32 [rows, length] as `segment_ids`."""
    places = np.arange(segment_ids.shape[1], dtype=np.int32)
    starts = np.zeros(segment_ids.shape, np.int32)
    starts[:, 1:] = np.where(segment_ids[:, 1:] != segment_ids[:, :-1], places[1:], 0)
    positions = places - np.maximum.accumulate(starts, axis=1)
    return np.where(segment_ids > 0, positions, 0).astype(np.int32)


def _checked(lengths: np.ndarray, capacity: int) -> np.ndarray:
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"lengths must lie between 1 and {capacity}, not {lengths.min()} and {lengths.max()}"
        )
    return lengths
