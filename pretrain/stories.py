"""Plain text: small stories, descriptions, letters and dialogues about everyday life."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pretrain.grammar import Writer, read_sections
from pretrain.voice import well_typed

_TEMPLATES = read_sections("stories.txt")
_LINE_BREAK = " // "


def story(w: Writer) -> str:
    """An opening, some sentences and an end, about the same people and things."""
    rng = w.rng
    middles = rng.sample(_TEMPLATES["middle"], rng.randint(2, 6))
    templates = [rng.choice(_TEMPLATES["opening"]), *middles, rng.choice(_TEMPLATES["ending"])]
    sentences = [w.write(template) for template in templates]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def description(w: Writer) -> str:
    """Some sentences on an animal, a city, a person or a dish."""
    return well_typed(w.write(w.rng.choice(_TEMPLATES["description"])))


def letter(w: Writer) -> str:
    """A short letter or notice."""
    return _lines(w, "letter")


def talk(w: Writer) -> str:
    """Two people talking."""
    return _lines(w, "talk")


def _lines(w: Writer, kind: str) -> str:
    template = w.rng.choice(_TEMPLATES[kind])
    return "\n".join(w.write(line) for line in template.split(_LINE_BREAK))


FAMILIES: Sequence[tuple[Callable[[Writer], str], float]] = (
    (story, 4),
    (description, 2),
    (letter, 1.5),
    (talk, 1.5),
)
