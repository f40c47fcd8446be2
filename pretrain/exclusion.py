"""Keeps texts that are evaluated on out of the corpus."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_WORD = re.compile(r"[a-z0-9]+")
_KEY = 3  # words by which texts are looked up; shorter texts are said everywhere and are not kept out


class Exclusion:
    """Finds whether a text contains one of some others, but for case, punctuation and spaces.

    Args:
        texts: What must not occur, not even as a part; texts of fewer than three words are let through.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._by_start: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for text in texts:
            words = words_of(text)
            if len(words) >= _KEY:
                self._by_start.setdefault(words[:_KEY], set()).add(words)

    def hits(self, text: str) -> bool:
        """Whether one of the texts occurs in this one."""
        words = words_of(text)
        for at, start in enumerate(zip(words, words[1:], words[2:], strict=False)):
            for excluded in self._by_start.get(start, ()):
                if words[at : at + len(excluded)] == excluded:
                    return True
        return False

    def __len__(self) -> int:
        return sum(map(len, self._by_start.values()))


def read_prompts(files: Iterable[Path]) -> Iterator[str]:
    """The first column of CSV files with a header, and the user messages of JSONL conversations."""
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                next(reader := csv.reader(file))
                yield from (row[0] for row in reader if row)
            else:
                for line in file:
                    yield from (m["content"] for m in json.loads(line)["messages"] if m["role"] == "user")


def words_of(text: str) -> tuple[str, ...]:
    """A text but for case, punctuation and spaces."""
    return tuple(_WORD.findall(text.lower().replace("'", "").replace("’", "")))
