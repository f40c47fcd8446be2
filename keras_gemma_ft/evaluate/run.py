"""The verb `evaluate`: what a run trained beside its base, on the held-out rows."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keras_gemma_ft import checkpoint
from keras_gemma_ft.data.encoding import ScriptEncoder
from keras_gemma_ft.data.from_config import variant_of
from keras_gemma_ft.data.readers import conversations, read
from keras_gemma_ft.data.rows import Conversation, Problem, Row
from keras_gemma_ft.data.template import Encoded, Template
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.compare import Evaluation, evaluate_models
from keras_gemma_ft.evaluate.forgetting import forgetting_check, general_conversations
from keras_gemma_ft.evaluate.model_view import ModelView
from keras_gemma_ft.evaluate.report import next_steps, write_report
from keras_gemma_ft.evaluate.run_record import read_run
from keras_gemma_ft.evaluate.table import comparison_table
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.from_config import build_base

GENERAL = "general"
"""What `Options.forgetting` is for the general set that ships."""


@dataclass(frozen=True)
class Options:
    """What the verb's flags say.

    Attributes:
        rows: Held-out rows at most, drawn at random by the run's seed; None: all.
        max_new_tokens: Longest answer; None: a quarter more than the longest expected one, and 8.
        batch_size: Answers at once.
        calibrate: Also the probability that each model gives its own answer.
        forgetting: "general", or a file with general rows; None: no check.
    """

    rows: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    calibrate: bool = False
    forgetting: str | None = None


def main(config: ConfigDict, workdir: str | Path, options: Options = Options()) -> Evaluation:
    """Evaluates a run's best checkpoint; leaves evaluation.json, predictions.jsonl and the report in the run.

    Raises:
        UserError: The run has no checkpoint, or a held-out row is wrong.
    """
    place = Path(workdir).expanduser()
    console = Console()

    # ------------------------------------------------------------------ rows
    held_out, skipped = _good(conversations(config, console.print)[1])
    rows = _drawn(held_out, options.rows, config.seed)
    general = _general(options.forgetting)

    # ------------------------------------------------------------------ models
    model, saved = checkpoint.tuned_model(config, place)
    base_model = build_base(config) if config.method == "full" else model

    # ------------------------------------------------------------------ base against tuned
    console.print(
        f"{_count(rows, held_out, skipped)}; the tuned model is that of step {saved.step:,}, "
        f"the best by held-out {saved.metric}",
        soft_wrap=True,
    )
    template = Template(
        variant_of(config.preset), thinking=config.data.thinking, train_on=config.data.train_on
    )
    with _progress(console) as progress:
        tuned = _view(model, "tuned", template, options.batch_size, progress)
        base = _view(base_model, "base", template, options.batch_size, progress)
        tokenizer = model.tokenizer
        evaluation = evaluate_models(
            tuned,
            rows,
            base=base,
            task=config.task.kind,
            max_new_tokens=options.max_new_tokens,
            count_tokens=lambda text: len(tokenizer.encode(text)),
            calibrate=options.calibrate,
            seed=config.seed,
        )
        chosen = {"step": saved.step, "held_out_loss": saved.eval_loss, "best_by": saved.metric}
        more: dict[str, Any] = {"checkpoint": chosen}
        if general is not None:
            more["forgetting"] = forgetting_check(
                tuned, base, general, source=str(options.forgetting), seed=config.seed
            )[1]

    # ------------------------------------------------------------------ result
    console.print(comparison_table(evaluation.comparisons, rows=len(rows)))
    if "forgetting" in more:
        console.print(f"forgetting: {more['forgetting']['verdict']}: {more['forgetting']['reason']}")
    evaluation.save(place, **more)
    advice = next_steps(config, read_run(place))
    for line in advice:
        console.print(f"next: {line}")
    report = write_report(place, advice=advice)
    for path in (place / "evaluation.json", place / "predictions.jsonl", report):
        console.print(str(path), soft_wrap=True)
    return evaluation


def _view(
    model: GemmaCausalLM,
    name: str,
    template: Template,
    batch_size: int,
    progress: Progress,
) -> ModelView:
    """A model as evaluation sees it, which shows how far its answers are."""
    encoder = ScriptEncoder(model.tokenizer)

    def generate(prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        task = progress.add_task(f"{name} answers", total=len(prompts))
        return model.generate(
            prompts,
            max_new_tokens,
            batch_size=batch_size,
            template=template,
            tell=lambda count: progress.advance(task, count),
        )

    def encode(row: Conversation) -> Encoded:
        batch = encoder.encode([template.script(row.messages, row.tools)])
        return Encoded(batch.token_ids, batch.loss_mask)

    view = model.adapters_off if name == "base" else contextlib.nullcontext
    return ModelView(generate, lambda batch: np.asarray(model.row_losses(batch)), encode, view=view)


def _good(rows: Any) -> tuple[list[Conversation], int]:
    """The rows that are right, and how many are not (with `data.on_error=skip`; else they are an error)."""
    every: list[Row] = list(rows)
    right = [row for row in every if not isinstance(row, Problem)]
    return right, len(every) - len(right)


def _drawn(rows: list[Conversation], count: int | None, seed: int) -> list[Conversation]:
    """Some of the rows, in their order: files are often sorted by class, so the first ones would not do."""
    if count is None or count >= len(rows):
        return rows
    if count < 1:
        raise UserError(f"{count} rows say nothing", where="--rows", remedy="choose 1 or more.")
    places = sorted(random.Random(seed).sample(range(len(rows)), count))
    return [rows[place] for place in places]


def _general(source: str | None) -> list[Conversation] | None:
    if source is None:
        return None
    return general_conversations() if source == GENERAL else _good(read(source))[0]


def _count(rows: list[Conversation], held_out: list[Conversation], skipped: int) -> str:
    text = f"{len(rows):,} held-out rows"
    if len(rows) < len(held_out):
        text = f"{len(rows):,} of {len(held_out):,} held-out rows"
    return text + (f", and {skipped:,} that are wrong were left out" if skipped else "")


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True)
