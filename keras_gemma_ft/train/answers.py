"""What a model in training answers: to read beside what was expected, and to count what it knows by heart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_gemma_ft.data.dataset import PackedDataset
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.generation import generate_tokens
from keras_gemma_ft.train.overfitting import Reproduction

# Prompts at once: one shape for all of a run's answers, so that little is compiled.
_ROWS = 8
_MOST_ROWS = 32  # where all of them are scored at each measurement
_LONGEST_ANSWER = 128

Sample = dict[str, str]
"""The `prompt` as it was put last, the `expected` answer, and the present `answer`."""


@dataclass(frozen=True)
class Question:
    """A prompt and what is to follow it, both int32 [tokens]."""

    prompt: np.ndarray
    answer: np.ndarray


def questions(rows: PackedDataset, count: int) -> list[Question]:
    """Up to `count` questions of packed rows, evenly from all over them: the last answer of an example each.

    Args:
        rows: Of prepared conversations.
        count: At most.
    """
    asked = []
    for index in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)):
        row = {name: array[0] for name, array in rows.rows([index]).items()}
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            places = row["segment_ids"] == segment
            tokens, learned = row["token_ids"][places], row["loss_mask"][places]
            if learned.any():
                end = int(np.flatnonzero(learned)[-1]) + 1
                start = int(np.flatnonzero(~learned[:end])[-1]) + 1
                asked.append(Question(tokens[:start], tokens[start:end]))
                break
    return asked


class Answers:
    """Greedy answers of a model to some of its training and held-out prompts.

    Args:
        model: With its vocabulary.
        train, held_out: Prepared rows.
        count: Of questions of either kind that `reproduction` asks, and of held-out ones that are scored.
        shown: Of held-out questions that `samples` gives.
        metric: Scores samples. Answers then are as long as the longest expected one, not 128 tokens at most:
            what is cut off cannot be right.

    Raises:
        UserError: There is a metric, and nothing to score.
    """

    def __init__(
        self,
        model: GemmaCausalLM,
        train: PackedDataset,
        held_out: PackedDataset,
        *,
        count: int = 16,
        shown: int = 3,
        metric: Callable[[Sequence[Sample]], float] | None = None,
    ) -> None:
        self._model = model
        self._shown = shown
        self._metric = metric
        self._rows = _ROWS if metric is None else min(max(_ROWS, count), _MOST_ROWS)
        train_questions, held_out_questions = questions(train, count), questions(held_out, count)
        longest = max(
            (len(question.answer) for question in [*train_questions, *held_out_questions]), default=1
        )
        self._longest = min(longest, _LONGEST_ANSWER) if metric is None else longest
        room = model.config.max_position_embeddings - self._longest
        # A prompt that leaves no room for an answer is not asked; the run goes on without it.
        self._train, self._held_out = (
            [question for question in asked if len(question.prompt) <= room]
            for asked in (train_questions, held_out_questions)
        )
        if metric is not None and not self._held_out:
            raise UserError(
                f"no held-out prompt leaves room for an answer of {self._longest:,} tokens",
                where="train.best_metric",
                remedy="choose loss, or hold out shorter rows.",
            )

    def samples(self) -> tuple[list[Sample], float | None]:
        """A few held-out questions with their answers, and the metric over all of them, if there is one."""
        # More than are shown, for the shape that `reproduction` needs too.
        asked = self._held_out[: self._rows] if self._metric is None else self._held_out
        samples = [
            as_sample(question, self._model.tokenizer, answer)
            for question, answer in zip(asked, self._answer(asked), strict=True)
        ]
        value = self._metric(samples) if self._metric is not None else None
        return samples[: self._shown], value

    def reproduction(self) -> Reproduction:
        """How many training and held-out answers come out verbatim, of each what `_longest` leaves."""
        counts = []
        for asked in (self._train, self._held_out):
            right = [
                answer == question.answer[: self._longest].tolist()
                for question, answer in zip(asked, self._answer(asked), strict=True)
            ]
            counts += [sum(right), len(right)]
        return Reproduction(*counts)

    def _answer(self, asked: Sequence[Question]) -> list[list[int]]:
        return generate_tokens(
            self._model.params(),
            self._model.config,
            [question.prompt for question in asked],
            self._longest,
            settings=self._model.settings,
            adapters=self._model.adapters(),
            stop_ids=self._model.tokenizer.stop_ids,
            batch_size=self._rows,
        )


def as_sample(question: Question, tokenizer: Tokenizer, answer: Sequence[int] = ()) -> Sample:
    """A question as text, with the tokens of an answer to it."""

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode([token for token in tokens if token not in tokenizer.stop_ids])

    return {
        "prompt": _last_turn(tokenizer.decode(question.prompt.tolist())),
        "expected": text(question.answer.tolist()),
        "answer": text(answer),
    }


def _last_turn(prompt: str) -> str:
    """What was said last before the model's turn, without the turn's own marks."""
    return (
        prompt.rpartition("<|turn>model")[0]
        .rpartition("<|turn>")[2]
        .partition("\n")[2]
        .removesuffix("<turn|>\n")
    )


def as_line(sample: dict[str, Any], width: int = 50) -> str:
    """A sample for the terminal: the prompt's end, the answer, and what was expected if that differs."""
    prompt, answer, expected = (" ".join(sample[name].split()) for name in ("prompt", "answer", "expected"))
    wanted = "" if answer == expected else f"  (expected {_cut(expected, width)!r})"
    asked = prompt if len(prompt) <= width else f"… {prompt[-width:]}"
    return f"{asked!r} → {_cut(answer, width)!r}{wanted}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width]} …"
