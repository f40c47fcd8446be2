"""Evaluates a tuned model beside its base on held-out conversations."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.examples import Example, text_of
from keras_gemma_ft.evaluate.statistics import Comparison, Metric, compare, ratio_metric
from keras_gemma_ft.evaluate.tasks import Outcome, Task, TaskScores, build_task
from keras_gemma_ft.json_files import write_json, write_lines

_WORST = 20


class Model(Protocol):
    """What evaluation asks of a model; base and tuned may be one model with its adapter off and on."""

    def generate(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers to conversations that end where the model is to speak, without their stop tokens."""

    def score(self, conversations: Sequence[Conversation]) -> tuple[np.ndarray, np.ndarray]:
        """Per conversation, float `[rows]` the summed loss in nats and int `[rows]` the supervised tokens."""


@dataclass(frozen=True)
class Answer:
    """One model's result on one row.

    Attributes:
        text: What it generated; empty where the task generates nothing.
        outcome: How that fared.
        loss: Summed over the supervised tokens of the *expected* answer, nats.
        tokens: How many those are.
        confidence: The probability that the model gives its own answer as a whole; None where not asked for.
    """

    text: str
    outcome: Outcome
    loss: float
    tokens: int
    confidence: float | None = None


@dataclass(frozen=True)
class Row:
    """One held-out row with both answers."""

    example: Example
    tuned: Answer
    base: Answer | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluation.json` (the summary) and `predictions.jsonl` (the rows) hold.

    Attributes:
        kind: Of the task.
        comparisons: Held-out loss and perplexity, then the task's metrics.
        rows: In the order of the conversations.
        details: What only this kind of task has, for "tuned" and, where there is one, "base".
        seconds: Wall-clock time of each part.
        confidence: Of the intervals.
    """

    kind: str
    comparisons: list[Comparison]
    rows: list[Row]
    details: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    confidence: float = 0.95

    def metric(self, name: str) -> Comparison:
        """The comparison of that name.

        Raises:
            KeyError: There is none.
        """
        for comparison in self.comparisons:
            if comparison.name == name:
                return comparison
        raise KeyError(name)

    def worst(self, count: int = _WORST) -> list[Row]:
        """The rows on which the tuned model fails worst, by score and then by loss per token."""
        if self.kind == "perplexity":  # nothing was answered
            return []
        wrong = [row for row in self.rows if row.tuned.outcome.score < 1 and not row.tuned.outcome.correct]
        return sorted(
            wrong, key=lambda row: (row.tuned.outcome.score, -row.tuned.loss / max(1, row.tuned.tokens))
        )[:count]

    def to_json(self) -> dict[str, Any]:
        """The summary, with the worst rows but not all of them."""
        return {
            "version": 1,
            "task": self.kind,
            "rows": len(self.rows),
            "confidence": self.confidence,
            "metrics": [dataclasses.asdict(comparison) for comparison in self.comparisons],
            "details": self.details,
            "worst": [_row_json(row) for row in self.worst()],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def save(self, directory: str | Path, **more: Any) -> None:
        """Writes `evaluation.json`, with the fields of `more`, and `predictions.jsonl`."""
        directory = Path(directory)
        write_lines(directory / "predictions.jsonl", (_row_json(row) for row in self.rows))
        write_json(directory / "evaluation.json", {**self.to_json(), **more})


def evaluate_models(
    tuned: Model,
    conversations: Sequence[Conversation],
    *,
    base: Model | None = None,
    task: Task | str = "auto",
    max_new_tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    calibrate: bool = False,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    **settings: Any,
) -> Evaluation:
    """Losses, answers, scores and intervals of a tuned model and, if given, its base on the same rows.

    Args:
        tuned: The model that training gave.
        conversations: Held-out rows, each ending in the expected answer.
        base: The model before training.
        task: A task, its name, or "auto": recognized from the rows.
        max_new_tokens: Longest answer; None: a quarter more than the longest expected one, and 8.
        count_tokens: Counts a text's tokens, for that default; without it a token is taken as 2 characters.
        calibrate: Also the probability that each model gives its own answer (one more pass of `score`).
        confidence: Of the intervals.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        settings: Of a task given by name: `labels`, `abstentions`, `constraints`.

    Raises:
        UserError: There are no rows, a row does not end in an answer, or the task is unknown.
    """
    if not conversations:
        raise UserError(
            "there is no held-out row",
            where="data.eval",
            remedy="name a file with rows, or set data.eval_fraction.",
        )
    examples = [Example.from_conversation(row) for row in conversations]
    chosen = build_task(task, examples, **settings) if isinstance(task, str) else task
    if max_new_tokens is None:
        count = count_tokens or (lambda text: -(-len(text) // 2))
        max_new_tokens = 8 + int(1.25 * max(count(row.reference) for row in examples))

    seconds: dict[str, float] = {}
    results: dict[str, tuple[list[Metric], TaskScores, list[Answer]]] = {}
    for name, model in (("base", base), ("tuned", tuned)):
        if model is not None:
            results[name] = _evaluate_one(
                model, conversations, examples, chosen, max_new_tokens, calibrate, name, seconds
            )
    metrics = {name: [*losses, *scores.metrics] for name, (losses, scores, _) in results.items()}
    comparisons = compare(
        metrics.get("base"), metrics["tuned"], confidence=confidence, resamples=resamples, seed=seed
    )
    answers = {name: result[2] for name, result in results.items()}
    rows = [
        Row(example, answers["tuned"][index], answers["base"][index] if base is not None else None)
        for index, example in enumerate(examples)
    ]
    details = {name: scores.details for name, (_, scores, _) in results.items() if scores.details}
    return Evaluation(chosen.kind, comparisons, rows, details, seconds, confidence)


def _evaluate_one(
    model: Model,
    conversations: Sequence[Conversation],
    examples: Sequence[Example],
    task: Task,
    max_new_tokens: int,
    calibrate: bool,
    name: str,
    seconds: dict[str, float],
) -> tuple[list[Metric], TaskScores, list[Answer]]:
    start = time.perf_counter()
    losses, tokens = (np.asarray(column) for column in model.score(conversations))
    seconds[f"{name}_loss"] = time.perf_counter() - start
    texts = [""] * len(examples)
    confidences: list[float | None] = [None] * len(examples)
    if task.generates:
        start = time.perf_counter()
        texts = [text.strip() for text in model.generate([row.asked for row in examples], max_new_tokens)]
        seconds[f"{name}_answers"] = time.perf_counter() - start
        if calibrate:
            start = time.perf_counter()
            confidences = _confidences(model, conversations, texts)
            seconds[f"{name}_confidence"] = time.perf_counter() - start
    scores = task.score(texts, [row.reference for row in examples], examples)
    answers = [
        Answer(text, outcome, float(loss), int(count), probability)
        for text, outcome, loss, count, probability in zip(
            texts, scores.outcomes, losses, tokens, confidences, strict=True
        )
    ]
    return loss_metrics(losses, tokens), scores, answers


def loss_metrics(losses: np.ndarray, tokens: np.ndarray) -> list[Metric]:
    """Held-out loss (nats a supervised token, over all rows together) and perplexity, its exponential."""
    return [
        ratio_metric("loss", "held-out loss", losses, tokens, better="lower"),
        ratio_metric("perplexity", "perplexity", losses, tokens, better="lower", transform=np.exp),
    ]


def _confidences(
    model: Model, conversations: Sequence[Conversation], texts: Sequence[str]
) -> list[float | None]:
    """exp(−loss) of each model's own answer in the place of the expected one.

    None where the answer is empty, and where earlier model turns would count into the loss.
    """
    own, places = [], []
    for place, (conversation, text) in enumerate(zip(conversations, texts, strict=True)):
        turns = [message["role"] for message in conversation.messages]
        if text and turns.count("model") + turns.count("assistant") == 1:
            messages = [*conversation.messages[:-1], {**conversation.messages[-1], "content": text}]
            own.append(dataclasses.replace(conversation, messages=messages))
            places.append(place)
    confidences: list[float | None] = [None] * len(texts)
    if own:
        losses, _ = model.score(own)
        for place, loss in zip(places, np.asarray(losses), strict=True):
            confidences[place] = float(np.exp(-loss))
    return confidences


def _row_json(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "origin": row.example.origin,
        "prompt": [{"role": m["role"], "content": text_of(m)} for m in row.example.prompt],
        "reference": row.example.reference,
    }
    for name, answer in (("base", row.base), ("tuned", row.tuned)):
        if answer is not None:
            record[name] = {
                "answer": answer.text,
                "score": answer.outcome.score,
                "correct": answer.outcome.correct,
                "note": answer.outcome.note,
                "loss": answer.loss,
                "tokens": answer.tokens,
                "confidence": answer.confidence,
            }
    return record
