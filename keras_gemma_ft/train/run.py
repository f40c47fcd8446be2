"""A training run, in the order in which it happens: place, data, model, directory, fit, result."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import keras
from ml_collections import ConfigDict

from keras_gemma_ft import backend, checkpoint
from keras_gemma_ft.advice import Settings, as_lines, before_training
from keras_gemma_ft.best_metric import LOSSES
from keras_gemma_ft.config import validate
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.json_files import read_json
from keras_gemma_ft.model.flops import floor_flops, peak_flops
from keras_gemma_ft.model.lora import weight_name
from keras_gemma_ft.train import workdir as directory
from keras_gemma_ft.train.answers import Answers
from keras_gemma_ft.train.audit import Audit
from keras_gemma_ft.train.batches import Batches
from keras_gemma_ft.train.callbacks.lazy_logs import LazyLogs
from keras_gemma_ft.train.callbacks.learning_audit import LearningAudit
from keras_gemma_ft.train.callbacks.measurements import Measurements, Writer
from keras_gemma_ft.train.callbacks.overfitting_detector import OverfittingDetector
from keras_gemma_ft.train.callbacks.validation import Validation
from keras_gemma_ft.train.examples import Examples, prepare_examples
from keras_gemma_ft.train.interruption import Interrupted, StopOnSignal
from keras_gemma_ft.train.metrics_file import MetricsFile
from keras_gemma_ft.train.optimizers import adamw
from keras_gemma_ft.train.overfitting import Verdict
from keras_gemma_ft.train.progress import TerminalProgress, duration
from keras_gemma_ft.train.remat_choice import choose_remat
from keras_gemma_ft.train.task_metric import TaskMetric
from keras_gemma_ft.train.tensorboard import TensorBoardScalars
from keras_gemma_ft.train.trackers import require as require_trackers
from keras_gemma_ft.train.trackers import trackers


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        workdir: The run directory.
        step: Updates made.
        losses: Held-out loss by step, of this process.
        best: The best checkpoint by `train.best_metric`.
        signal: Of a request to stop that came too late to leave anything undone.
    """

    workdir: Path
    step: int
    losses: Mapping[int, float]
    best: checkpoint.Saved
    signal: int | None = None


def main(
    config: ConfigDict, workdir: str | Path, *, resume: bool = False, data: Path | None = None
) -> Result:
    """Trains as the config says, and leaves the run in `workdir`.

    Nothing is written before the config, the data and the preset have proven right.

    Args:
        config: As `validate` accepts it.
        workdir: The run directory.
        resume: Go on after the last checkpoint.
        data: Where the prepared rows are; None: `data` in `workdir`, where they are prepared if need be.

    Raises:
        UserError: A fault in the config, the data, the preset or the directory.
        Interrupted: SIGINT or SIGTERM came; the run is saved and can be resumed.
    """
    # ------------------------------------------------------------------ place
    validate(config)
    require_trackers(config.train.trackers)
    place = directory.check(workdir, resume=resume)
    if resume:
        directory.check_same_config(place, config)

    with directory.nothing_half_written(place):
        # -------------------------------------------------------------- data
        examples = prepare_examples(config, data or place / "data", print)
        metric = TaskMetric.from_config(config, examples.held_out)

        # -------------------------------------------------------------- model
        from keras_gemma_ft.model.from_config import build_model

        model = build_model(config)

    # ------------------------------------------------------------------ steps, fit, result
    count = config.train.answers
    answers = None
    if count:
        answers = Answers(model, examples.train, examples.held_out, count=count, metric=metric)
    return fit(model, examples, config, place, resume=resume, answers=answers)


def fit(
    model: keras.Model,
    examples: Examples,
    config: ConfigDict,
    workdir: str | Path,
    *,
    resume: bool = False,
    answers: Answers | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Result:
    """Trains a model on prepared rows; the second half of `main`.

    All steps of a run are one epoch to Keras, whose epochs are whole or not at all. Ours are counted in
    steps, so a run can stop after any step and go on there.

    Args:
        model: Takes the batches of `Batches` in `fit`, logs each batch's own `loss` and `tokens`, splits a
            batch by `compile(micro_batch_size=…)`, and logs gradients by `compile(log_gradients=True)`.
        examples: Rows for training, and held-out rows.
        config: As `validate` accepts it.
        workdir: The run directory; made if need be.
        resume: Go on after the last checkpoint.
        answers: Asked for samples at each held-out measurement, with their score where `train.best_metric` is
            a metric of answers, and what is known by heart when the held-out loss has stopped falling.
        callbacks: More of them, called after those of the run.
    """
    place = Path(workdir)
    train = config.train
    began = time.monotonic()
    if train.best_metric not in LOSSES and answers is None:
        raise UserError(
            f"{train.best_metric!r} is measured on answers, and none are given",
            where="train.best_metric",
            remedy=f"give fit() answers, or choose {' or '.join(LOSSES)}.",
        )

    # ------------------------------------------------------------------ steps and schedule
    batches = Batches(
        examples.train, train.batch_size, seed=config.seed, epochs=train.epochs, last_step=train.max_steps
    )
    held_out = Batches(examples.held_out, train.micro_batch_size or train.batch_size)
    total = batches.total_steps
    optimizer = adamw(
        train.learning_rate,
        schedule=train.schedule,
        warmup_ratio=train.warmup_ratio,
        total_steps=total,
        clip_norm=train.clip_norm,
        weight_decay=train.weight_decay,
    )
    model.compile(optimizer=optimizer, micro_batch_size=train.micro_batch_size, log_gradients=True)
    settings = Settings.from_config(
        config, rows=examples.train_examples, steps_per_epoch=batches.steps_per_epoch
    )

    # ------------------------------------------------------------------ run directory
    checkpoints_dir = place / "checkpoints"
    if resume and checkpoint.find(checkpoints_dir) is not None:
        batches.first_step = checkpoint.restore(model, checkpoints_dir, "last", resume=True).step
    progress = TerminalProgress(total)
    _announce(progress, config, batches, examples, settings)
    if train.remat == "auto" and len(batches):
        progress.say(str(choose_remat(model, batches[0], method=config.method)))
    manifest = _manifest(place, examples, resume)
    directory.record(place / "config.json", config.to_dict())
    directory.record(place / "manifest.json", manifest)

    # ------------------------------------------------------------------ fit
    with (
        checkpoint.Checkpoints(checkpoints_dir, train.best_metric) as checkpoints,
        StopOnSignal(progress.say) as stop,
    ):

        def save(step: int, loss: float | None, value: float | None) -> None:
            if step > 0:
                epoch, batch = divmod(step, batches.steps_per_epoch)
                position = {"step": step, "epoch": epoch, "batch": batch, "seed": config.seed}
                checkpoints.save(model, step, eval_loss=loss, value=value, position=position)

        def restore_best() -> None:
            checkpoints.wait()
            if checkpoints.last_step is not None:
                saved = checkpoint.restore(model, checkpoints_dir, "best")
                progress.say(f"the weights of step {saved.step} are back: {_describe(saved)}")

        writers: list[Writer] = [progress]
        if backend.is_first_process():
            writers += [
                MetricsFile(place / "metrics.jsonl"),
                TensorBoardScalars(place / "tensorboard"),
                *trackers(config, place, progress.say),
            ]
        measurements = Measurements(
            batches, writers, optimizer.learning_rate_at, _tokens_at_peak(model, config.method)
        )
        detector = OverfittingDetector(
            train.on_overfitting,
            warmup_steps=round(train.warmup_ratio * total),
            total_steps=total,
            settings=settings,
            probe=answers.reproduction if answers is not None else None,
            metrics_file=place / "metrics.jsonl",
            restore=restore_best,
            report=lambda verdict: _tell(progress, verdict),
        )
        validation = Validation(
            held_out,
            every=train.eval_every or math.ceil(batches.steps_per_epoch / 4),
            first_step=batches.first_step,
            last_step=total,
            measurements=measurements,
            answers=answers,
            metric=train.best_metric,
            listeners=(save, lambda step, loss, value: detector.record_held_out(loss, step)),
        )

        def record_audit(audit: Audit) -> None:
            measurements.settle()  # it took the device's time
            measurements.write(audit.to_json())

        audit = LearningAudit(group_of=weight_name, first_step=batches.first_step, report=record_audit)
        try:
            if len(batches):
                # The audit waits for the first step; its compilation has been timed before.
                watching = [measurements, audit, detector, validation, *callbacks, stop]
                log_lazily = LazyLogs(watching, model, len(batches))
                # Keras would shuffle the batches: their order is ours.
                model.fit(batches.feed(), shuffle=False, verbose=0, callbacks=log_lazily)
            step = int(optimizer.iterations)
            if checkpoints.last_step != step:
                if stop.received:
                    save(step, None, None)
                else:
                    validation.measure(step)
        except (UserError, OSError):
            with contextlib.suppress(OSError):  # the disk is full
                directory.record(place / "manifest.json", {**manifest, "status": "failed"})
            raise
        finally:
            for writer in writers:
                writer.close()

    # ------------------------------------------------------------------ result
    best = checkpoint.find(checkpoints_dir, "best")
    assert best is not None, "a run of one step or more has saved a checkpoint"
    seconds = time.monotonic() - began
    interrupted = stop.received is not None and step < total
    manifest["status"] = "interrupted" if interrupted else "finished"
    manifest["cost"] = _cost(manifest["cost"], measurements, seconds)
    manifest["result"] = {
        "step": step,
        "total_steps": total,
        "held_out_loss": validation.losses.get(step),
        "best_step": best.step,
        "best_held_out_loss": best.eval_loss,
        "best_metric": best.metric,
        "best_value": best.value,
    }
    directory.record(place / "manifest.json", manifest)
    if stop.received is not None and interrupted:
        raise Interrupted(
            f"Stopped after step {step} of {total}; the run is saved.\n"
            f"Go on with: keras-gemma-ft train --workdir={workdir} --resume",
            stop.received,
        )
    progress.say(f"done: {step} steps in {duration(seconds)}; {_describe(best)}\n{place}")
    return Result(place, step, dict(validation.losses), best, stop.received)


def _tokens_at_peak(model: Any, method: str) -> float | None:
    peak = peak_flops()
    if peak is None:
        return None
    return peak * jax.device_count() / floor_flops(model.config, 1, all_weights=method == "full")


def _describe(best: checkpoint.Saved) -> str:
    value = "not measured" if best.value is None else f"{best.value:.4f}"
    loss = "" if best.metric == "loss" or best.eval_loss is None else f", held-out loss {best.eval_loss:.4f}"
    return f"best held-out {best.metric} {value} at step {best.step}{loss}"


def _announce(
    progress: TerminalProgress, config: ConfigDict, batches: Batches, examples: Examples, settings: Settings
) -> None:
    rows, length = len(examples.train), examples.train.length
    progress.say(
        f"{config.method} of {config.preset}: {examples.train_examples:,} examples in {rows:,} rows of "
        f"{length:,} tokens, {examples.held_out_examples:,} held out; {batches.total_steps:,} steps of "
        f"{batches.batch_size} rows"
    )
    if batches.first_step:
        progress.say(f"going on after step {batches.first_step:,} of {batches.total_steps:,}")
        return
    for line in as_lines(before_training(settings)):
        progress.say(f"note: {line}")


def _tell(progress: TerminalProgress, verdict: Verdict) -> None:
    if verdict.kind != "warming up":
        lines = [f"step {verdict.step}: {verdict.kind}: {verdict.reason}", *verdict.remedies[:1]]
        progress.say("\n  ".join(lines))


def _manifest(place: Path, examples: Examples, resume: bool) -> dict[str, Any]:
    path = place / "manifest.json"
    before = read_json(path) if resume and path.exists() else {}
    earlier = (before.get("data") or {}).get("sha256")
    now = examples.facts.get("sha256")
    if earlier and now and earlier != now:
        raise UserError(
            "the rows are not those that the run began with",
            where="data.train",
            remedy="bring the file back as it was, or start another run.",
        )
    return {
        "status": "running",
        "data": examples.facts,
        "environment": directory.environment(),
        "cost": before.get("cost") or {},
    }


def _cost(before: Mapping[str, Any], measurements: Measurements, seconds: float) -> dict[str, Any]:
    """Time and tokens of the run, those before a resume included, and the most memory in use."""
    tokens = before.get("tokens", 0) + measurements.tokens
    training = before.get("training_seconds", 0.0) + measurements.seconds
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": round(before.get("seconds", 0.0) + seconds, 2),
        "training_seconds": round(training, 2),
        "compile_seconds": measurements.compile_seconds,
        "tokens": tokens,
        "tokens_per_second": round(tokens / training, 1) if training else None,
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
    }
