"""Packed rows give the logits of their examples apart; test_gradients.py has their losses and gradients."""

import numpy as np
import pytest
from conversations import apart, conversations, packed, unpacked
from decoders import distance, logits
from small_models import KINDS

# As sums of 40 terms run in another order.
TOLERANCE = 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_logits(decoder, kind, seed):
    rows = conversations(seed)
    _, *together = packed(rows, padding_id=7)
    batches = apart(rows)
    alone = [logits(decoder(kind), *packed(batch, padding_id=0)[1:]) for batch in batches]
    found = logits(decoder(kind), *together)[together[2] > 0]
    assert distance(found, unpacked(batches, alone, rows)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_leak_would_be_seen(decoder, kind):
    _, token_ids, positions, segment_ids = packed(conversations(0), padding_id=7)
    sound = logits(decoder(kind), token_ids, positions, segment_ids)
    leaking = logits(decoder(kind), token_ids, positions, np.minimum(segment_ids, 1))
    late = logits(decoder(kind), token_ids, positions + (segment_ids == 2), segment_ids)
    running = logits(decoder(kind), token_ids, None, segment_ids)
    assert distance(leaking[segment_ids > 0], sound[segment_ids > 0]) > 100 * TOLERANCE
    # Rotation is relative: where a segment starts to count does not matter, beyond rounding.
    for shifted in (late, running):
        assert distance(shifted[segment_ids > 0], sound[segment_ids > 0]) < 10 * TOLERANCE
