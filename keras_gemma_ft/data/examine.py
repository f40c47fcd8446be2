"""What is to be known of each row of a chunk: lengths, keys and sketches to compare by, and what stands out.

This is what a worker process of `inspect` does; the rows themselves stay with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from keras_gemma_ft.data.dedupe import Sketches
from keras_gemma_ft.data.language import language
from keras_gemma_ft.data.layout import MODEL_ROLES, SYSTEM_ROLES
from keras_gemma_ft.data.personal import masked, personal
from keras_gemma_ft.data.preview import Preview, Previewer
from keras_gemma_ft.data.rows import Conversation, Problem, Row
from keras_gemma_ft.data.shards import Recipe, ShardMaker
from keras_gemma_ft.data.tokenizer import Tokenizer

_SHOWN = 120  # characters of a question or an answer in a report
_PREVIEWED = 3  # rows of the first chunk, besides those that show something
_PREVIEWED_CHARACTERS = 20_000
_TRIED = 20


@dataclass(slots=True)
class Examined:
    """What a chunk's rows are. All lists and arrays have one entry for each row that can be trained on.

    Attributes:
        counts: See `prepare`; with `rows`, the packed ones.
        problems: Of the rows that cannot be trained on.
        origins, labels: Of the conversations.
        questions, answers: Beginnings of what is asked and answered, for people to read.
        question_keys, answer_keys: uint64; equal where system, question and tools are, and where all that the
            model says is, but for white space.
        asked: Sketches of the questions, to find near duplicates by.
        tokens, spelled: int64; tokens before anything is shortened, and control tokens that the text spells.
        empty: bool; whether the model says nothing in its last message.
        languages: See `language`.
        personal: See `personal`; masked.
        previews: By what they show.
    """

    counts: Counter[str]
    problems: list[Problem]
    origins: list[str]
    labels: list[str | None]
    questions: list[str]
    answers: list[str]
    question_keys: np.ndarray
    answer_keys: np.ndarray
    asked: Sketches
    tokens: np.ndarray
    spelled: np.ndarray
    empty: np.ndarray
    languages: list[str | None]
    personal: list[dict[str, list[str]]]
    previews: dict[str, list[Preview]]


class Examiner:
    """Examines chunks by one recipe."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._maker = ShardMaker(tokenizer, recipe)
        self._previewer = Previewer(tokenizer, recipe)
        self._max_length = recipe.max_length

    def __call__(self, chunk: Sequence[Row], number: int) -> Examined:
        encoded, indices, faults = self._maker.encode(chunk)
        lengths, spelled = encoded.lengths, encoded.neutralized
        packed, counts, problems = self._maker.pack(chunk, encoded, indices, faults, number)
        counts["rows"] = len(packed.token_ids)
        sound = [place for place, index in enumerate(indices) if index not in faults]
        rows = [cast(Conversation, chunk[indices[place]]) for place in sound]
        lengths, spelled = lengths[sound], spelled[sound]
        questions, answers = [asked(row) for row in rows], [said(row) for row in rows]
        texts = [f"{question}\n{answer}" for question, answer in zip(questions, answers, strict=True)]
        return Examined(
            counts,
            problems,
            [printable(row.origin) for row in rows],
            [row.label and printable(row.label) for row in rows],
            [shown(text) for text in questions],
            [shown(text) for text in answers],
            np.fromiter((key(context(row)) for row in rows), np.uint64, len(rows)),
            np.fromiter(map(key, answers), np.uint64, len(rows)),
            Sketches.of([question or answer for question, answer in zip(questions, answers, strict=True)]),
            lengths,
            spelled,
            np.fromiter((not said_last(row) for row in rows), bool, len(rows)),
            [language(text) for text in texts],
            [_personal(text) for text in texts],
            self._previews(rows, lengths, spelled, number),
        )

    def _previews(
        self, rows: Sequence[Conversation], lengths: np.ndarray, spelled: np.ndarray, number: int
    ) -> dict[str, list[Preview]]:
        """The first rows of the first chunk, and the first in each with something to see."""
        found = {}
        if number == 0:
            found["first"] = [preview for row in rows[:_PREVIEWED] for preview in self._preview(row)]
        for name, holds in (("spelled", spelled > 0), ("shortened", lengths > self._max_length)):
            for place in np.flatnonzero(holds)[:_TRIED].tolist():
                if previews := self._preview(rows[place]):  # none where a row is left out
                    found[name] = previews[:2]
                    break
        return found

    def _preview(self, row: Conversation) -> list[Preview]:
        return self._previewer.of(row) if len(asked(row)) + len(said(row)) < _PREVIEWED_CHARACTERS else []


def asked(row: Conversation) -> str:
    """What users (and tools) say in a row, of which near duplicates are told."""
    return "\n".join(
        text_of(message)
        for message in row.messages
        if message["role"] not in MODEL_ROLES and message["role"] not in SYSTEM_ROLES
    )


def said(row: Conversation) -> str:
    """What the model says in a row, calls and thoughts included."""
    return "\n".join(_model_text(message) for message in row.messages if message["role"] in MODEL_ROLES)


def said_last(row: Conversation) -> str:
    """What the model says in its last message."""
    return next((_model_text(m) for m in reversed(row.messages) if m["role"] in MODEL_ROLES), "")


def text_of(message: Mapping[str, Any]) -> str:
    """A message's content as text, stripped."""
    content = message.get("content") or ""
    return content.strip() if isinstance(content, str) else "".join(part["text"] for part in content).strip()


def key(text: str) -> int:
    """64 bits that are equal for texts that differ in white space only."""
    words = " ".join(text.split()).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def printable(text: str) -> str:
    """The text with escapes for what upsets terminals and files: controls and halves of surrogate pairs."""
    return text if text.isprintable() else _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """The beginning of a text in one line."""
    line = printable(" ".join(text[: 4 * _SHOWN].split()))
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def context(row: Conversation) -> str:
    """All that the model's answers depend on."""
    parts = [
        f"{message['role']}: {text_of(message)}"
        for message in row.messages
        if message["role"] not in MODEL_ROLES
    ]
    return "\n".join([*parts, json.dumps(row.tools)] if row.tools else parts)


def _model_text(message: Mapping[str, Any]) -> str:
    thought = message.get("reasoning") or message.get("reasoning_content") or ""
    calls = message.get("tool_calls")
    parts = [thought.strip(), text_of(message), json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(filter(None, parts))


def _personal(text: str) -> dict[str, list[str]]:
    return {kind: list(map(masked, matches)) for kind, matches in personal(text).items()}
