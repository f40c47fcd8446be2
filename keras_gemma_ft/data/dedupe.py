"""Near duplicates: which of many texts are alike, found without comparing every text with every other.

Two texts are as alike as their shingles: the share of stretches of five characters that both have (Jaccard
similarity), with case, punctuation and white space left aside.

    Is there a reason my new card hasn't arrived yet?
    Is there a reason my new card hasn't arrived?        0.90

MinHash signatures find the pairs worth comparing (Broder, "On the resemblance and containment of documents",
1997), in bands as in Leskovec et al., "Mining of Massive Datasets", ch. 3; each pair found is then compared
by its shingles. Of long texts a sample of the shingles is kept, the ones with the smallest hashes, so that a
text takes two kilobytes at most. A text of up to 512 shingles is compared exactly; for longer ones the
standard error of the similarity is 0.02.

What more than a tenth of the texts share, an instruction or a template, is no sign of a copy and is left out.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_gemma_ft.data.words import ragged_arange

SHINGLE = 5
"""Characters of a shingle."""
KEPT = 512
"""Shingles kept of a text."""
PERMUTATIONS = 128
"""Hash functions of a signature."""
# Share of the near pairs that may be missed, at the threshold; of more similar pairs fewer are.
_MISSED = 5e-4
# Shingles of this share of the distinct texts (and of at least so many texts) are boilerplate.
_BOILERPLATE_SHARE = 0.1
_BOILERPLATE_TEXTS = 20
_BOILERPLATE_SAMPLE = 20_000  # texts that are looked at for it
# Of a sampled text at least so many shingles besides boilerplate, or it is compared as a whole only.
_FEWEST = 16
# In larger groups of candidates a text meets the first one and its neighbour only, unless it is known to be
# alike already: enough to find that copies belong together, and the work does not grow with the square.
_ALL_PAIRS = 32
_MOST_CHARACTERS = 200_000  # of a text that are looked at
_PAIRS_AT_ONCE = 20_000
_SHINGLES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class NearPairs:
    """Pairs of similar texts.

    Attributes:
        first, second: int64 [pairs]; numbers of the texts, the first below the second.
        similarity: float64 [pairs], from the threshold to 1.
        group: int64 [texts]; texts that are alike, directly or through others, have the number of the first
            of them; all others have their own.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    group: np.ndarray


def normalized(text: str) -> str:
    """The text in lower case, words separated by single spaces and nothing else; without words, as it is."""
    text = text[:_MOST_CHARACTERS]
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


_WORD = re.compile(r"\w+")


class Sketches:
    """The shingles of texts, as hashes.

    Attributes:
        hashes: uint32 [shingles]; of each text in ascending order, without repetition.
        offsets: int64 [texts + 1]; text i has `hashes[offsets[i]:offsets[i + 1]]`.
        limits: uint32 [texts]; all shingles up to this hash are there: the largest number, unless the text
            was sampled.
        whole: uint64 [texts]; hash of the whole normalized text.
    """

    def __init__(
        self, hashes: np.ndarray, offsets: np.ndarray, limits: np.ndarray, whole: np.ndarray
    ) -> None:
        self.hashes, self.offsets, self.limits, self.whole = hashes, offsets, limits, whole

    def __len__(self) -> int:
        return len(self.limits)

    @property
    def sizes(self) -> np.ndarray:
        """Shingles of each text, int64."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, texts: Sequence[str]) -> Sketches:
        """Sketches of texts."""
        padded = [normalized(text).ljust(SHINGLE) for text in texts]
        lengths = np.fromiter(map(len, padded), np.int64, len(padded))
        points = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
        rows = np.repeat(np.arange(len(padded), dtype=np.uint64), lengths - SHINGLE + 1)
        starts = ragged_arange(np.cumsum(lengths) - lengths, lengths - SHINGLE + 1)
        shingles = np.zeros(len(starts), np.uint64)
        for place in range(SHINGLE):
            shingles = (shingles + points[starts + place]) * _ODD
        keys = _distinct(rows << np.uint64(32) | _mixed(shingles))
        row_of = (keys >> np.uint64(32)).astype(np.int64)
        counts = np.bincount(row_of, minlength=len(padded))
        first = np.cumsum(counts) - counts
        kept = np.arange(len(keys)) - first[row_of] < KEPT
        hashes = keys.astype(np.uint32)
        limits = np.full(len(padded), _LARGEST, np.uint32)
        sampled = counts > KEPT
        limits[sampled] = hashes[first[sampled] + KEPT - 1]
        whole = np.fromiter((_digest(text) for text in padded), np.uint64, len(padded))
        return cls(hashes[kept], _offsets(np.minimum(counts, KEPT)), limits, whole)

    @classmethod
    def joined(cls, parts: Sequence[Sketches]) -> Sketches:
        """The sketches of several lots of texts, one after the other."""
        if not parts:
            return cls.of([])
        sizes = np.concatenate([part.sizes for part in parts])
        return cls(
            np.concatenate([part.hashes for part in parts]),
            _offsets(sizes),
            np.concatenate([part.limits for part in parts]),
            np.concatenate([part.whole for part in parts]),
        )

    def chosen(self, which: np.ndarray) -> Sketches:
        """The sketches of some texts, given by number in ascending order."""
        if len(which) == len(self):
            return self
        sizes = self.sizes[which]
        hashes = self.hashes[ragged_arange(self.offsets[:-1][which], sizes)]
        return Sketches(hashes, _offsets(sizes), self.limits[which], self.whole[which])

    def without_boilerplate(self) -> Sketches:
        """The same, without shingles that a large share of the texts has."""
        every = max(1, len(self) // _BOILERPLATE_SAMPLE)
        sample = self.chosen(np.arange(0, len(self), every))
        shingles, counts = np.unique(sample.hashes, return_counts=True)
        common = shingles[counts > max(_BOILERPLATE_TEXTS, _BOILERPLATE_SHARE * len(sample))]
        if not len(common):
            return self
        own = np.empty(len(self.hashes), bool)
        for start in range(0, len(own), _SHINGLES_AT_ONCE):
            hashes = self.hashes[start : start + _SHINGLES_AT_ONCE]
            place = np.minimum(np.searchsorted(common, hashes), len(common) - 1)
            own[start : start + _SHINGLES_AT_ONCE] = common[place] != hashes
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(own)])
        return Sketches(self.hashes[own], before[self.offsets], self.limits, self.whole)


def near_pairs(sketches: Sketches, threshold: float) -> NearPairs:
    """Pairs of texts whose similarity is at least `threshold`.

    Texts that are equal once normalized always are pairs: each with the first of its kind. At the threshold
    itself about one near pair in 2,000 is missed, above it fewer. Of a text that many others resemble some
    pairs are listed, not all.
    """
    _, first_of, kind_of = np.unique(sketches.whole, return_index=True, return_inverse=True)
    representative = first_of[kind_of]
    copies = np.flatnonzero(representative != np.arange(len(sketches)))
    distinct = np.sort(first_of)
    kinds = sketches.chosen(distinct).without_boilerplate()
    left, right, similarity = _near(kinds, threshold)
    first = np.concatenate([representative[copies], distinct[left]])
    second = np.concatenate([copies, distinct[right]])
    similarity = np.concatenate([np.ones(len(copies)), similarity])
    order = np.lexsort((first, second))
    first, second = first[order], second[order]
    return NearPairs(first, second, similarity[order], _groups(len(sketches), first, second))


def similarities(sketches: Sketches, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Jaccard similarity of pairs of texts given by number, float64 [pairs]."""
    found = np.zeros(len(left))
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        found[part] = _similarities(sketches, left[part], right[part])
    return found


def _similarities(sketches: Sketches, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    # Both texts are known up to the lower limit; above it one of them may lack shingles it has.
    limits = np.minimum(sketches.limits[left], sketches.limits[right])
    keys = []
    for texts in (left, right):
        sizes = sketches.sizes[texts]
        hashes = sketches.hashes[ragged_arange(sketches.offsets[:-1][texts], sizes)]
        pairs = np.repeat(np.arange(len(left), dtype=np.uint64), sizes)
        keys.append((pairs << np.uint64(32) | hashes)[hashes <= np.repeat(limits, sizes)])
    both = np.sort(np.concatenate(keys))
    pair_of = (both >> np.uint64(32)).astype(np.int64)
    shared = np.bincount(pair_of[1:][both[1:] == both[:-1]], minlength=len(left))
    total = np.bincount(pair_of, minlength=len(left)) - shared
    return shared / np.maximum(total, 1)


def signatures(sketches: Sketches) -> np.ndarray:
    """MinHash signatures, uint32 [texts, PERMUTATIONS]; no text may be empty.

    The least of `a · hash + b mod 2³²` over the shingles, for PERMUTATIONS pairs of an odd a and a b.
    """
    found = np.empty((len(sketches), PERMUTATIONS), np.uint32)
    ends = sketches.offsets
    start = 0
    while start < len(sketches):
        stop = int(np.searchsorted(ends, ends[start] + _SHINGLES_AT_ONCE, side="right")) - 1
        stop = max(stop, start + 1)
        hashes = sketches.hashes[ends[start] : ends[stop]]
        for k in range(PERMUTATIONS):
            found[start:stop, k] = np.minimum.reduceat(hashes * _A[k] + _B[k], ends[start:stop] - ends[start])
        start = stop
    return found


def _near(sketches: Sketches, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First, second and similarity of near pairs among distinct texts."""
    sampled = sketches.limits < _LARGEST
    texts = np.flatnonzero(sketches.sizes >= np.where(sampled, _FEWEST, 1))
    signed = signatures(sketches.chosen(texts))
    # The signatures' own estimate of the similarity, four standard errors below the threshold.
    least = threshold - 4 * math.sqrt(threshold * (1 - threshold) / PERMUTATIONS)
    candidates = [_no_pairs()]
    near = [_no_pairs()]
    group = np.arange(len(sketches))
    width = _band_width(threshold)
    for band in range(PERMUTATIONS // width):
        order, starts, sizes = _buckets(signed[:, band * width : (band + 1) * width])
        small = sizes <= _ALL_PAIRS
        pairs = _all_pairs(order, starts[small], sizes[small])
        candidates.append(texts[pairs[:, _plausible(signed, pairs, least)]])
        pairs = texts[_few_pairs(order, starts[~small], sizes[~small])]
        pairs = pairs[:, group[pairs[0]] != group[pairs[1]]]
        if pairs.size:
            near.append(pairs[:, similarities(sketches, *pairs) >= threshold])
            group = _groups(len(sketches), *np.concatenate(near, axis=1))
    first, second = np.concatenate(candidates + near, axis=1)
    keys = _distinct(first * len(sketches) + second)
    first, second = keys // max(len(sketches), 1), keys % max(len(sketches), 1)
    similarity = similarities(sketches, first, second)
    is_near = similarity >= threshold
    return first[is_near], second[is_near], similarity[is_near]


def _buckets(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of two or more equal rows: an order of the rows, and where in it each begins, and its size."""
    keys = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        keys = (keys + column) * _ODD
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    borders = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]])[: len(keys) + 1])
    sizes = np.diff(borders)
    return order, borders[:-1][sizes > 1], sizes[sizes > 1]


def _all_pairs(order: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Every pair inside buckets, int64 [2, pairs]; the first is below the second."""
    found = [_no_pairs()]
    for distance in range(1, int(sizes.max(initial=1))):
        first = ragged_arange(starts, np.maximum(sizes - distance, 0))
        found.append(np.stack([order[first], order[first + distance]]))
    return np.concatenate(found, axis=1)


def _few_pairs(order: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Inside buckets, each but the first with the first and with the one before it, int64 [2, pairs]."""
    members = ragged_arange(starts + 1, sizes - 1)
    with_first = np.stack([np.repeat(order[starts], sizes - 1), order[members]])
    return np.concatenate([with_first, np.stack([order[members - 1], order[members]])], axis=1)


def _plausible(signed: np.ndarray, pairs: np.ndarray, least: float) -> np.ndarray:
    found = np.zeros(pairs.shape[1], bool)
    for start in range(0, len(found), _PAIRS_AT_ONCE):
        first, second = pairs[:, start : start + _PAIRS_AT_ONCE]
        found[start : start + _PAIRS_AT_ONCE] = (signed[first] == signed[second]).mean(axis=1) >= least
    return found


def _no_pairs() -> np.ndarray:
    return np.zeros((2, 0), np.int64)


def _band_width(threshold: float) -> int:
    """Rows of a band: the most with which a pair at the threshold agrees in some band almost always."""
    for width in range(PERMUTATIONS, 1, -1):
        if (1 - threshold**width) ** (PERMUTATIONS // width) <= _MISSED:
            return width
    return 1


def _groups(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    _, component = connected_components(links, directed=False)
    _, first_of = np.unique(component, return_index=True)
    return first_of[component]


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _distinct(values: np.ndarray) -> np.ndarray:
    """`np.unique`, five times as fast for the many distinct values there are here."""
    values = np.sort(values)
    return values[np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spreads 64 bits over 32 that look random: the finalizer of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(32)


_LARGEST = np.iinfo(np.uint32).max
_ODD = np.uint64(0x9E3779B97F4A7C15)
_generator = np.random.Generator(np.random.Philox(1))
_A = _generator.integers(0, 2**31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_B = _generator.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
