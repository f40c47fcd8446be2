"""Near duplicates against comparing every text with every other, by sets of strings."""

import itertools
import random
import re
import time
from collections import Counter
from functools import cache

import numpy as np
import pytest

from keras_gemma_ft.data.dedupe import (
    KEPT,
    PERMUTATIONS,
    Sketches,
    near_pairs,
    normalized,
    signatures,
    similarities,
)

_letters = random.Random(7)
WORDS = ["".join(_letters.choices("abcdefghijklmnoprstuw", k=_letters.randint(2, 9))) for _ in range(600)]


@cache
def _plain_shingles(text: str) -> set[str]:
    """What a shingle is, once more and as plainly as can be; for ASCII texts with words."""
    text = " ".join(re.findall("[a-z0-9_]+", text.lower()))
    while len(text) < 5:
        text += " "
    return {text[i : i + 5] for i in range(len(text) - 4)}


def _plain_similarity(a: str, b: str) -> float:
    a_shingles, b_shingles = _plain_shingles(a), _plain_shingles(b)
    return len(a_shingles & b_shingles) / len(a_shingles | b_shingles)


def _edited(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(rng.randint(0, 2)):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words) + rng.choice(["", "!", "?", f" {rng.choice(WORDS)}"])


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Sentences, of which each comes in several versions."""
    rng = random.Random(0)
    found = []
    for _ in range(100):
        sentence = " ".join(rng.choices(WORDS, k=rng.randint(3, 25)))
        found += [sentence.capitalize(), *(_edited(sentence, rng) for _ in range(3))]
    rng.shuffle(found)
    return found


def test_similarity_is_that_of_the_sets_of_shingles(texts):
    sketches = Sketches.of(texts)
    left, right = (np.array(side) for side in zip(*itertools.combinations(range(60), 2), strict=True))
    expected = [_plain_similarity(texts[a], texts[b]) for a, b in zip(left, right, strict=True)]
    assert similarities(sketches, left, right) == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_pairs_and_groups_are_those_of_comparing_all_with_all(texts, threshold):
    near = {
        (a, b)
        for a, b in itertools.combinations(range(len(texts)), 2)
        if _plain_similarity(texts[a], texts[b]) >= threshold
    }
    group = list(range(len(texts)))
    for a, b in sorted(near):
        old, new = max(group[a], group[b]), min(group[a], group[b])
        group = [new if g == old else g for g in group]
    found = near_pairs(Sketches.of(texts), threshold)
    assert len(near) > 60
    assert found.group.tolist() == group
    kinds = Counter(map(normalized, texts))
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs <= near
    # Of texts that are equal once normalized, one stands for all.
    of_distinct = {(a, b) for a, b in near if kinds[normalized(texts[a])] == kinds[normalized(texts[b])] == 1}
    assert of_distinct <= pairs
    for a, b, similarity in zip(found.first, found.second, found.similarity, strict=True):
        assert similarity == pytest.approx(_plain_similarity(texts[a], texts[b]))


def test_signatures_estimate_the_similarity_without_bias(texts):
    sketches = Sketches.of(texts)
    signed = signatures(sketches)
    left, right = (np.array(side) for side in zip(*itertools.combinations(range(200), 2), strict=True))
    estimated = (signed[left] == signed[right]).mean(axis=1)
    exact = similarities(sketches, left, right)
    error = np.sqrt(exact * (1 - exact) / PERMUTATIONS)
    assert np.all(np.abs(estimated - exact) <= 5.5 * error + 1e-9)  # one in 20,000 lies beyond 4
    assert abs(np.mean(estimated - exact)) < 0.01


def test_long_texts_are_compared_by_a_sample_of_their_shingles():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(5_000)]
    base = rng.choices(words, k=4_000)
    texts = [" ".join(base)]
    for changed in (100, 400, 1_000, 2_000):
        other = list(base)
        for place in rng.sample(range(len(base)), changed):
            other[place] = rng.choice(words)
        texts.append(" ".join(other))
    sketches = Sketches.of(texts)
    assert sketches.sizes.tolist() == [KEPT] * 5
    found = similarities(sketches, np.zeros(4, np.int64), np.arange(1, 5))
    exact = [_plain_similarity(texts[0], text) for text in texts[1:]]
    assert exact[0] > 0.9 > 0.5 > exact[3]
    for similarity, expected in zip(found, exact, strict=True):
        assert abs(similarity - expected) < 4 * np.sqrt(expected * (1 - expected) / KEPT)


def test_an_instruction_that_all_share_is_no_sign_of_a_copy():
    rng = random.Random(0)
    instruction = " ".join(rng.choices(WORDS, k=60))
    questions = ["".join(rng.choices("abcdefghijklmnop qrstuvwxyz", k=60)) for _ in range(300)]
    questions[200] = questions[100].upper() + "!"
    questions[201] = questions[101] + " xyz"
    texts = [f"{instruction} {question}" for question in questions]
    assert _plain_similarity(texts[0], texts[1]) > 0.6
    found = near_pairs(Sketches.of(texts), 0.6)
    assert list(zip(found.first, found.second, strict=True)) == [(100, 200), (101, 201)]


def test_a_few_texts_have_no_boilerplate():
    texts = ["Where is my card that I ordered last week", "Where is my card that I ordered last week?!"] * 4
    assert set(near_pairs(Sketches.of(texts), 0.8).group.tolist()) == {0}


def test_texts_without_words_are_what_they_are():
    found = near_pairs(Sketches.of(["", "?!", "?!", "🙂", "🙃", "", "a", "A "]), 0.8)
    assert found.group.tolist() == [0, 1, 1, 3, 4, 0, 6, 6]


@pytest.mark.parametrize("texts", [[], ["alone"], ["", ""]])
def test_hardly_any_text(texts):
    assert len(near_pairs(Sketches.of(texts), 0.8).group) == len(texts)


def test_sketches_do_not_depend_on_the_lots_in_which_texts_come(texts):
    whole = Sketches.of(texts)
    parts = Sketches.joined([Sketches.of(texts[:7]), Sketches.of([]), Sketches.of(texts[7:])])
    for name in ("hashes", "offsets", "limits", "whole"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_work_grows_with_the_texts_where_all_are_alike():
    rng = random.Random(0)
    sentence = " ".join(rng.choices(WORDS, k=20))
    sketches = _without_boilerplate_rule([f"{sentence} {rng.choice(WORDS)} {n}" for n in range(5_000)])
    start = time.process_time()
    found = near_pairs(sketches, 0.8)
    assert set(found.group.tolist()) == {0}
    assert len(found.first) < 5_000 * 50  # of twelve million pairs
    assert time.process_time() - start < 5


def _without_boilerplate_rule(texts: list[str]) -> Sketches:
    """Sketches in which all texts stay alike: what each shares with all others would be left out."""

    class Kept(Sketches):
        def chosen(self, which):
            return Kept(*vars(super().chosen(which)).values())

        def without_boilerplate(self):
            return self

    return Kept(*vars(Sketches.of(texts)).values())
