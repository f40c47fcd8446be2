"""Reads what a run left in its directory; what is missing is named, not invented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_gemma_ft.best_metric import rank
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.json_files import read_json, read_lines

# What each file of a run directory gives to the report.
PARTS: Mapping[str, str] = {
    "metrics.jsonl": "training curves, throughput and verdicts",
    "evaluation.json": "base against tuned",
    "predictions.jsonl": "length against error, calibration",
    "config.json": "configuration",
    "manifest.json": "data, environment and cost",
}


class Best(NamedTuple):
    """The best checkpoint: by which metric, where, and what was measured there."""

    metric: str
    step: int
    value: float
    loss: float


@dataclass(frozen=True)
class RunRecord:
    """A run directory in memory.

    Attributes:
        directory: Where it is.
        metrics: The records of `metrics.jsonl` in order of step; of a step run twice, as after a resume, the
            later record of each field.
        evaluation: `evaluation.json`.
        predictions: The rows of `predictions.jsonl`.
        config: `config.json`.
        manifest: `manifest.json`.
        missing: The files that are not there.
    """

    directory: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a field such as "loss" or "eval_loss": float `[points]` twice; NaN for null."""
        points = {
            record["step"]: np.nan if record[name] is None else float(record[name])
            for record in self.metrics
            if name in record and "step" in record
        }
        steps = sorted(points)
        return np.array(steps, np.float64), np.array([points[step] for step in steps], np.float64)

    @property
    def best(self) -> Best | None:
        """The best checkpoint, as the run chose it; None where nothing was measured."""
        metric = (self.config.get("train") or {}).get("best_metric", "loss")
        points = [dict(zip(*self.curve(f"eval_{name}"), strict=True)) for name in (metric, "loss")]
        steps = points[0].keys() & points[1].keys()
        if not steps:
            return None
        # What a run begins with is no checkpoint of it.
        step = max(steps, key=lambda step: (step > 0, *rank(metric, *(of[step] for of in points)), step))
        return Best(metric, int(step), *(float(of[step]) for of in points))

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts in order."""
        latest = {record["step"]: record for record in self.metrics if "verdict" in record}
        return [latest[step] for step in sorted(latest)]

    @property
    def turning_points(self) -> list[dict[str, Any]]:
        """The verdicts that differ from the one before."""
        verdicts = self.verdicts
        return [
            verdict
            for place, verdict in enumerate(verdicts)
            if not place or verdicts[place - 1]["verdict"] != verdict["verdict"]
        ]

    @property
    def audit(self) -> dict[str, Any] | None:
        """Of the first step, where it was recorded."""
        return next((record["audit"] for record in self.metrics if "audit" in record), None)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What was answered during training: `prompt`, `expected`, and first and last answer."""
        records = [record for record in self.metrics if record.get("samples")]
        if not records:
            return []
        first, last = records[0], records[-1]
        return [
            {
                "prompt": late["prompt"],
                "expected": late["expected"],
                "steps": [first["step"], last["step"]],
                "answers": [early["answer"], late["answer"]],
            }
            for early, late in zip(first["samples"], last["samples"], strict=False)
        ]


def read_run(directory: str | Path) -> RunRecord:
    """Reads a run directory.

    Raises:
        UserError: It does not exist, holds nothing of a run, or holds a file that cannot be read.
    """
    directory = Path(directory)
    present = [name for name in PARTS if (directory / name).is_file()]
    if not present:
        raise UserError(
            "holds no run: neither metrics.jsonl nor evaluation.json nor config.json",
            where=str(directory),
            remedy="give the --workdir of a run.",
        )
    content: dict[str, Any] = {}
    for name in present:
        read = read_json if name.endswith(".json") else lambda path: list(read_lines(path))
        content[Path(name).stem] = read(directory / name)
    return RunRecord(directory, missing=tuple(name for name in PARTS if name not in present), **content)
