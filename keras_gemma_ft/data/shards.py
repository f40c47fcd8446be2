"""A chunk of conversations to a shard of rows: laid out, encoded, shortened, checked, packed, written.

This is what a worker process does; nothing here depends on which worker does it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from keras_gemma_ft.data.dataset import write_shard
from keras_gemma_ft.data.encoding import EncodedBatch, ScriptEncoder
from keras_gemma_ft.data.mask_contract import RULES, MaskContract
from keras_gemma_ft.data.packing import PackedRows, best_fit, fill_rows
from keras_gemma_ft.data.rows import Conversation, Problem, Row
from keras_gemma_ft.data.script import Script
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.truncation import POLICIES, Policy, Truncation
from keras_gemma_ft.data.words import ragged_arange
from keras_gemma_ft.errors import UserError

# The template's own text of the shortest trainable conversation takes about this many tokens.
_SHORTEST_ROW = 16


@dataclass(frozen=True)
class Recipe:
    """How rows are made of conversations.

    Attributes:
        template: Variant, thoughts, and which turns are trained.
        max_length: Tokens of a row, and the most a conversation may have.
        packing: Whether conversations share rows, isolated from each other; else each has its own.
        truncation: What becomes of longer conversations; see `truncation`.
        seed: Decides which conversations share a row.
    """

    template: Template = field(default_factory=Template)
    max_length: int = 2048
    packing: bool = True
    truncation: Policy = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.truncation not in POLICIES:
            raise UserError(
                f"truncation is {self.truncation!r}", remedy=f"choose one of {', '.join(POLICIES)}."
            )
        if self.max_length < _SHORTEST_ROW:
            raise UserError(
                f"max_length is {self.max_length}", remedy=f"rows need {_SHORTEST_ROW} tokens at the least."
            )

    def to_json(self) -> dict[str, Any]:
        """The recipe as a flat dict for the manifest."""
        return {**asdict(self.template), **{k: v for k, v in asdict(self).items() if k != "template"}}


@dataclass(slots=True)
class Shard:
    """What became of a chunk.

    Attributes:
        name: Of the shard's files.
        rows: Number of rows; 0 if nothing was written.
        sha256: Of the rows.
        counts: See `prepare.Counts`.
        problems: Of the conversations that were left out, in order.
    """

    name: str
    rows: int
    sha256: str
    counts: Counter[str]
    problems: list[Problem]


class ShardMaker:
    """Makes shards by one recipe; remembers the words it met from chunk to chunk."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._recipe = recipe
        self._encoder = ScriptEncoder(tokenizer)
        self._contract = MaskContract(tokenizer)
        self._truncation = Truncation(recipe.truncation, recipe.max_length, tokenizer)

    def make(self, conversations: Sequence[Row], number: int, directory: Path) -> Shard:
        """Writes the shard of the `number`-th chunk into a directory."""
        rows, counts, problems = self.rows(conversations, number)
        name = f"rows-{number:05d}"
        if len(rows.token_ids):
            write_shard(directory, name, rows)
        digest = hashlib.sha256()
        for array in (rows.token_ids, rows.segment_ids, rows.loss_mask):
            digest.update(array.data)
        return Shard(name, len(rows.token_ids), digest.hexdigest(), counts, problems)

    def rows(
        self, conversations: Sequence[Row], number: int = 0
    ) -> tuple[PackedRows, Counter[str], list[Problem]]:
        """Rows of a chunk in memory, with counts and the conversations that are left out."""
        return self.pack(conversations, *self.encode(conversations), number)

    def pack(
        self,
        conversations: Sequence[Row],
        encoded: EncodedBatch,
        indices: Sequence[int],
        faults: dict[int, Problem],
        number: int = 0,
    ) -> tuple[PackedRows, Counter[str], list[Problem]]:
        """`rows` of a chunk that was encoded; adds to `faults` what the mask contract finds."""
        shortened = self._truncation.apply(encoded)
        broken = self._contract.broken(shortened.batch, shortened.cut)
        for example in np.flatnonzero(broken >= 0).tolist():
            index = indices[shortened.source[example]]
            origin = cast(Conversation, conversations[index]).origin
            faults[index] = Problem(RULES[broken[example]], origin, "give every row an answer to learn.")
        problems = [faults[index] for index in sorted(faults)]
        examples = _select(shortened.batch, broken < 0)
        rows = fill_rows(examples, self._assign(examples.lengths, number), self._recipe.max_length)
        counts = shortened.counts + Counter(
            conversations=len(conversations),
            skipped=len(problems),
            examples=len(examples),
            tokens=len(examples.token_ids),
            trained_tokens=int(examples.loss_mask.sum()),
            neutralized_tokens=int(encoded.neutralized.sum()),
            neutralized_conversations=int((encoded.neutralized > 0).sum()),
        )
        return rows, counts, problems

    def encode(self, conversations: Sequence[Row]) -> tuple[EncodedBatch, list[int], dict[int, Problem]]:
        """What can be laid out, with the indices of the conversations, and what cannot, by index."""
        template = self._recipe.template
        scripts: list[Script] = []
        indices: list[int] = []
        faults: dict[int, Problem] = {}
        for index, conversation in enumerate(conversations):
            if isinstance(conversation, Problem):
                faults[index] = conversation
                continue
            try:
                scripts.append(template.script(conversation.messages, conversation.tools))
                indices.append(index)
            except UserError as error:
                where = f"{conversation.origin}, {error.where}" if error.where else conversation.origin
                faults[index] = Problem(error.what, where, error.remedy)
        return self._encoder.encode(scripts), indices, faults

    def _assign(self, lengths: np.ndarray, number: int) -> np.ndarray:
        """The row of each example. Equally long ones are shuffled, so that neighbours in a file part."""
        if not self._recipe.packing:
            return np.arange(len(lengths))
        key = np.array([self._recipe.seed % 2**64, number], np.uint64)
        shuffled = np.argsort(np.random.Philox(key=key).random_raw(len(lengths)), kind="stable")
        row_of = np.empty(len(lengths), np.int64)
        row_of[shuffled] = best_fit(lengths[shuffled], self._recipe.max_length)
        return row_of


def _select(batch: EncodedBatch, chosen: np.ndarray) -> EncodedBatch:
    if chosen.all():
        return batch
    lengths = batch.lengths[chosen]
    tokens = ragged_arange(batch.offsets[:-1][chosen], lengths)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return EncodedBatch(batch.token_ids[tokens], batch.loss_mask[tokens], offsets, batch.neutralized[chosen])
