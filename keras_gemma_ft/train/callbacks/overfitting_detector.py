"""`OverfittingDetector`: gives a verdict at each held-out measurement, and acts on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_gemma_ft import backend
from keras_gemma_ft.advice import Settings
from keras_gemma_ft.json_files import read_lines
from keras_gemma_ft.train.callbacks.live_weights import snapshot
from keras_gemma_ft.train.curves import Curve
from keras_gemma_ft.train.overfitting import HARMFUL, Reproduction, Thresholds, Verdict, judge

Action = Literal["report", "stop", "stop_and_restore_best"]


class OverfittingDetector(keras.callbacks.Callback):
    """Judges the run at each held-out loss, of `fit(validation_data=…)` or given to `record_held_out`.

    Args:
        action: What to do when the run does harm: only report, stop, or stop and take back the best weights.
        patience: That many harmful verdicts in a row before acting; one suffices where the run has diverged.
        warmup_steps: Of the learning rate.
        total_steps: Planned, if known.
        settings: The user's numbers, for the remedies.
        probe: Generates some training and held-out answers greedily and counts the verbatim ones. It is asked
            only when the held-out loss has stopped falling, as generation takes time.
        metrics_file: A `metrics.jsonl` to which verdicts are appended. Losses that it holds already, of the
            run that this one resumes, belong to the curves.
        restore: Brings back the best checkpoint; None: a copy of the trainable variables is kept in memory at
            each new lowest held-out loss, which suits adapters.
        report: Called with each verdict that differs in kind from the one before.
        batch_losses: Whether `logs["loss"]` of a batch is that batch's own loss, as `GemmaCausalLM` gives it.
            False for an ordinary Keras model, whose log is a running mean: one point an epoch is then taken.
        thresholds: What counts as a change that matters.

    Attributes:
        verdicts: All of them, in order.
    """

    def __init__(
        self,
        action: Action = "report",
        *,
        patience: int = 2,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        settings: Settings | None = None,
        probe: Callable[[], Reproduction] | None = None,
        metrics_file: str | Path | None = None,
        restore: Callable[[], None] | None = None,
        report: Callable[[Verdict], None] | None = None,
        batch_losses: bool = True,
        thresholds: Thresholds | None = None,
    ) -> None:
        super().__init__()
        self.action = action
        self.patience = patience
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.settings = settings
        self.probe = probe
        self.metrics_file = Path(metrics_file) if metrics_file is not None else None
        self.restore = restore
        self.report = report
        self.batch_losses = batch_losses
        self.thresholds = thresholds or Thresholds()
        self.verdicts: list[Verdict] = []
        self._training = False
        self._step = self._epoch_start = 0
        self._train: list[tuple[int, Any]] = []
        self._held_out: list[tuple[int, float]] = []
        self._rates: list[tuple[int, float]] = []
        self._rate_at: Callable[[int], float] | None = None
        self._lowest = math.inf
        self._best_weights: dict[str, np.ndarray] | None = None
        self._harmful = 0
        self._restores = False

    # Keras calls these.

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._training = True
        optimizer = getattr(self.model, "optimizer", None)
        self._step = int(optimizer.iterations) if optimizer is not None else 0
        self._rate_at = getattr(optimizer, "learning_rate_at", None)
        self._read_earlier()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch_start = self._step

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._step = self._epoch_start + batch + 1
        if self.batch_losses and logs and "loss" in logs:
            self._train.append((self._step, logs["loss"]))  # not read before a verdict needs it
            if self._rate_at is not None:
                self._rates.append((self._step, self._rate_at(self._step - 1)))

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        if self._training and logs and "loss" in logs:
            self.record_held_out(float(logs["loss"]))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        logs = logs or {}
        if not self.batch_losses and "loss" in logs:
            self._train.append((self._step, logs["loss"]))
        # An ordinary model's training loss of an epoch comes after its held-out loss.
        measured = bool(self._held_out) and self._held_out[-1][0] == self._step
        if not self._held_out or (measured and not self.batch_losses):
            self._judge()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self._training = False
        if not self._restores:
            return
        if self.restore is not None:
            self.restore()
        elif self._best_weights is not None:
            for variable in self.model.trainable_variables:
                variable.assign(self._best_weights[variable.path])
        self._restores = False

    # What others call.

    def record_held_out(self, loss: float, step: int | None = None) -> None:
        """A held-out loss, at the present step if none is given; a verdict follows."""
        step = self._step if step is None else step
        self._held_out.append((step, loss))
        if loss < self._lowest:
            self._lowest = loss
            if self.action == "stop_and_restore_best" and self.restore is None:
                self._best_weights = snapshot(self.model)
        if self.batch_losses:
            self._judge()

    def _judge(self) -> None:
        verdict = self._verdict(None)
        if self.probe is not None and verdict.kind in ("plateau", "overfitting"):
            verdict = self._verdict(self.probe())
        changed = not self.verdicts or self.verdicts[-1].kind != verdict.kind
        self.verdicts.append(verdict)
        if self.metrics_file is not None and backend.is_first_process():
            with self.metrics_file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(verdict.to_json()) + "\n")
        if changed and self.report is not None:
            self.report(verdict)
        self._act(verdict)

    def _verdict(self, reproduction: Reproduction | None) -> Verdict:
        self._train = [(step, float(loss)) for step, loss in self._train]
        return judge(
            Curve.of(self._train),
            Curve.of(self._held_out),
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            learning_rates=Curve.of(self._rates),
            reproduction=reproduction,
            settings=self.settings,
            thresholds=self.thresholds,
        )

    def _act(self, verdict: Verdict) -> None:
        self._harmful = self._harmful + 1 if verdict.kind in HARMFUL else 0
        needed = 1 if verdict.kind == "diverged" else self.patience
        if self.action == "report" or self._harmful < needed:
            return
        self.model.stop_training = True
        self._restores = self.action == "stop_and_restore_best"

    def _read_earlier(self) -> None:
        """Takes over the curves of the run that this one resumes, up to the step at which it starts."""
        if self.metrics_file is None or not self.metrics_file.exists():
            return
        for record in read_lines(self.metrics_file):
            step = record.get("step")
            if step is None or step > self._step:
                continue
            for field, points in (
                ("loss", self._train),
                ("eval_loss", self._held_out),
                ("learning_rate", self._rates),
            ):
                if record.get(field) is not None:
                    points.append((step, record[field]))
