"""How people type: capitals or none, full stops or none, slips of the finger."""

from __future__ import annotations

import random
import re

_SENTENCE_START = re.compile(r"(^|[.!?]\s+)([a-z])")
_NAMES = re.compile(
    r"\b(i|monday|tuesday|wednesday|thursday|friday|saturday|sunday|spain|france|germany|italy|japan|mexico|"
    r"europe|london|paris|asia|canada|australia|turkey|apple pay|google pay|visa|mastercard|english|french|"
    r"german|spanish|italian)\b"
)
_LETTERS = "etaoinshrdlucmfwypvbgk"


def well_typed(text: str) -> str:
    """Capitals at the starts of sentences and of names, and one mark at the end."""
    text = _NAMES.sub(lambda match: match[0].title(), text.strip())
    text = re.sub(r"\s+([?!.,])", r"\1", text)
    text = re.sub(r"([?!.,])[?!.,]+", r"\1", text)
    text = _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)
    return text if text[-1:] in tuple('.!?")') else text + "."


def typed(rng: random.Random, text: str) -> str:
    """A message as somebody types it."""
    draw = rng.random()
    neat = well_typed(text)
    if draw < 0.45:
        message = neat
    elif draw < 0.6:
        message = neat.rstrip(".")
    elif draw < 0.75:
        message = neat.lower()
    elif draw < 0.95:
        message = neat.lower().rstrip(".?!")
    else:
        message = neat.rstrip(".") + rng.choice(["!", "!!", "??", "..."])
    if rng.random() < 0.12:
        message = message.replace("'", "")
    while rng.random() < 0.08:
        message = _slip(rng, message)
    return message


def _slip(rng: random.Random, text: str) -> str:
    """A letter doubled, left out, exchanged with its neighbour, or wrong."""
    places = [i for i, letter in enumerate(text) if letter.isalpha() and i]
    if len(places) < 4:
        return text
    at = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:at] + text[at] + text[at:]
    if kind == 1:
        return text[:at] + text[at + 1 :]
    if kind == 2:
        return text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]
    return text[:at] + rng.choice(_LETTERS) + text[at + 1 :]
