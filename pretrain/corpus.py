"""The text that `gemma4_tiny` learns from: conversations and plain text, all made up by templates.

    python -m pretrain.corpus 20        # shows the first 20 documents

A document is determined by its number, so any part of the corpus can be made anywhere, in any order.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

from pretrain import requests, stories, tasks
from pretrain.exclusion import Exclusion
from pretrain.grammar import Writer, read_sections

Document = str | list[requests.Message]

NOTHING = Exclusion()
PHRASES = read_sections("phrases.txt")
FAMILIES = (*requests.FAMILIES, *tasks.FAMILIES, *stories.FAMILIES)
_MAKERS = [maker for maker, _ in FAMILIES]
_WEIGHTS = [weight for _, weight in FAMILIES]


def document(number: int) -> Document:
    """The document of that number: plain text, or the messages of a conversation."""
    rng = random.Random(number)
    return rng.choices(_MAKERS, _WEIGHTS)[0](Writer(rng, PHRASES))


def documents(first: int, last: int, excluded: Exclusion = NOTHING) -> Iterator[Document]:
    """The documents from `first` up to, without, `last`, but for those with an excluded text."""
    for made in map(document, range(first, last)):
        parts = [made] if isinstance(made, str) else [message["content"] for message in made]
        if not any(map(excluded.hits, parts)):
            yield made


def main() -> None:
    for made in documents(0, int(sys.argv[1])):
        if isinstance(made, str):
            print(made)
        else:
            print("\n".join(f"[{message['role']}] {message['content']}" for message in made))
        print("---")


if __name__ == "__main__":
    main()
