"""Writes the demo's data: messages to a town hall, and the office that answers each.

    python -m pretrain.demo_data keras_gemma_ft/presets/demo

Neither the offices nor these messages occur in the corpus.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from pretrain.exclusion import words_of
from pretrain.grammar import Writer, read_sections
from pretrain.voice import typed

TRAIN, HELD_OUT = 1500, 240
_PHRASE = "phrase "

Example = tuple[str, str]


def examples(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(message, office) pairs for training and held out, each office as often, all of them different.

    Two messages that differ by case and punctuation alone count as the same. The last template of an office
    is used for held-out messages only: a fifth of them is worded like nothing in training.
    """
    rng = random.Random(seed)
    sections = read_sections("demo.txt")
    phrases = {name.removeprefix(_PHRASE): lines for name, lines in sections.items() if _PHRASE in name}
    offices = [name for name in sections if _PHRASE not in name]
    seen: set[tuple[str, ...]] = set()

    def draw(count: int, unseen_share: float) -> list[Example]:
        made: list[Example] = []
        while len(made) < count:
            office = offices[len(made) % len(offices)]
            *usual, unseen = sections[office]
            template = unseen if rng.random() < unseen_share else rng.choice(usual)
            text = typed(rng, Writer(rng, phrases).write(template))
            if words_of(text) not in seen:
                seen.add(words_of(text))
                made.append((text, office))
        rng.shuffle(made)
        return made

    return draw(TRAIN, 0.0), draw(HELD_OUT, 0.2)


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "held_out"), examples(), strict=True):
        rows = [json.dumps({"prompt": text, "response": office}) for text, office in part]
        (target / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
