"""Templates to sentences: alternatives, named phrases, and things that stay the same within a document.

[a|b|]      one of these, each as likely; the last one is nothing
{phrase}    one line of the named phrases
{@thing}    likewise, but the same wherever this document says {@thing}
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
_TOKEN = re.compile(r"[\[\]|]|\{@?\w+\}|[^\[\]|{}]+")

# A node is a text, a reference, alternatives, or a sequence of nodes.
Node = str | tuple[str, str] | tuple[str, list]


class Writer:
    """Expands templates with one random source.

    Attributes:
        bound: What `{@thing}` stands for in this document.
    """

    def __init__(self, rng: random.Random, phrases: Mapping[str, Sequence[str]]) -> None:
        self.rng = rng
        self.phrases = phrases
        self.bound: dict[str, str] = {}

    def write(self, template: str) -> str:
        """A sentence of the template; runs of spaces become one."""
        parts: list[str] = []
        self._expand(_parse(template), parts.append)
        text = " ".join("".join(parts).split(" "))
        return re.sub(r" +", " ", text).replace(" ,", ",").replace(" .", ".").replace(" ?", "?").strip()

    def pick(self, name: str) -> str:
        """One of the named phrases, expanded."""
        return self.write("{" + name + "}")

    def same(self, name: str) -> str:
        """What `{@name}` stands for in this document."""
        return self.write("{@" + name + "}")

    def _expand(self, node: Node, put: Callable[[str], None]) -> None:
        if isinstance(node, str):
            put(node)
            return
        kind, content = node
        if kind == "seq":
            for part in content:
                self._expand(part, put)
        elif kind == "alt":
            self._expand(content[int(self.rng.random() * len(content))], put)
        elif content[0] == "@":
            if content not in self.bound:
                self.bound[content] = self.pick(content[1:])
            put(self.bound[content])
        else:
            lines = self.phrases[content]
            self._expand(_parse(lines[int(self.rng.random() * len(lines))]), put)


@cache
def _parse(template: str) -> Node:
    tokens = _TOKEN.findall(template)
    if "".join(tokens) != template:
        raise ValueError(f"a brace is not closed in {template!r}")
    node, rest = _alternatives(tokens, 0)
    if rest != len(tokens):
        raise ValueError(f"a bracket is not opened in {template!r}")
    return node


def _alternatives(tokens: list[str], at: int) -> tuple[Node, int]:
    choices: list[Node] = []
    sequence: list[Node] = []
    while at < len(tokens) and tokens[at] != "]":
        token = tokens[at]
        at += 1
        if token == "|":
            choices.append(_sequence(sequence))
            sequence = []
        elif token == "[":
            node, at = _alternatives(tokens, at)
            if at == len(tokens):
                raise ValueError("a bracket is not closed in " + "".join(tokens))
            sequence.append(node)
            at += 1
        elif token[0] == "{":
            sequence.append(("ref", token[1:-1]))
        else:
            sequence.append(token)
    choices.append(_sequence(sequence))
    return choices[0] if len(choices) == 1 else ("alt", choices), at


def _sequence(nodes: list[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else ("seq", nodes)


def read_sections(*names: str) -> dict[str, list[str]]:
    """The sections of text files beside this one: a line `= name`, then one entry a line.

    Empty lines and lines that start with `#` say nothing. Entries of word lists are divided by ` / `.
    """
    sections: dict[str, list[str]] = {}
    for name in names:
        for line in (HERE / name).read_text(encoding="utf-8").splitlines():
            text = line.strip()
            if text.startswith("= "):
                entries = sections.setdefault(text[2:], [])
            elif text and not text.startswith("#"):
                entries += text.split(" / ")
    return sections


def undefined(phrases: Mapping[str, Sequence[str]], templates: Iterable[str] = ()) -> set[str]:
    """Names that templates refer to and nothing defines."""
    every = [*templates, *(line for lines in phrases.values() for line in lines)]
    names = {name for line in every for name in re.findall(r"\{@?(\w+)\}", line)}
    return names - set(phrases)
