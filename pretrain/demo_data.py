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


def examples(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(message, office) pairs that differ by more than case and punctuation, each office as often."""
    rng = random.Random(seed)
    sections = read_sections("demo.txt")
    phrases = {name.removeprefix(_PHRASE): lines for name, lines in sections.items() if _PHRASE in name}
    offices = [name for name in sections if _PHRASE not in name]
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    while len(found) < count:
        office = offices[len(found) % len(offices)]
        text = typed(rng, Writer(rng, phrases).write(rng.choice(sections[office])))
        found.setdefault(words_of(text), (text, office))
    pairs = list(found.values())
    rng.shuffle(pairs)
    return pairs


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    pairs = examples(TRAIN + HELD_OUT)
    for name, part in (("train", pairs[:TRAIN]), ("held_out", pairs[TRAIN:])):
        rows = [json.dumps({"prompt": text, "response": office}) for text, office in part]
        (target / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
