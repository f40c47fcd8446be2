"""Successive halving over settings: many short runs, then longer ones of the better part.

The method is that of Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification".

Runs follow each other on one device. Every finished run is a line of `sweep.jsonl`, so a sweep that was
interrupted goes on where it stopped. A run that is promoted starts anew with the larger budget, because its
learning-rate schedule belongs to its length.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keras_gemma_ft.config import flatten
from keras_gemma_ft.errors import UserError, is_full
from keras_gemma_ft.json_files import finite, read_json, read_lines, write_json, write_lines, write_text

if TYPE_CHECKING:
    from rich.table import Table

Run = Callable[[dict[str, Any], Path], float | None]
JOURNAL = "sweep.jsonl"


@dataclass(frozen=True)
class Sweep:
    """What to try.

    Attributes:
        parameters: Config field ("lora.rank") to the values to try; the grid is their product.
        budgets: Values of `budget_field`, increasing: each is one round.
        budget_field: The config field that makes a run longer.
        keep: After each round one in `keep` runs goes on, at least one.
        trials: How many points of the grid to try, drawn at random; None: all.
        metric: Its name, for the table.
        better: Which direction is an improvement.
        seed: Of the draw.
    """

    parameters: Mapping[str, Sequence[Any]]
    budgets: Sequence[float] = (1, 3)
    budget_field: str = "train.epochs"
    keep: int = 3
    trials: int | None = None
    metric: str = "held-out loss"
    better: Literal["higher", "lower"] = "lower"
    seed: int = 0

    def __post_init__(self) -> None:
        def refuse(what: str, field: str) -> None:
            raise UserError(what, where=f"sweep.{field}")

        for name, values in self.parameters.items():
            if not isinstance(values, (list, tuple)):
                refuse(f"the values of {name} are {values!r}, not a list", "parameters")
        if not self.parameters or not all(self.parameters.values()):
            refuse("there is nothing to try: each parameter needs one value or more", "parameters")
        if self.budget_field in self.parameters:
            refuse(f"{self.budget_field} is the budget and cannot be tried too", "parameters")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            refuse("budgets must increase", "budgets")
        if self.keep < 2:
            refuse("one in 2 or more runs must go on", "keep")
        if self.trials is not None and self.trials < 1:
            refuse("one trial or more is needed", "trials")

    def points(self) -> list[dict[str, Any]]:
        """The points of the grid that are tried, each a map from config field to value."""
        names = list(self.parameters)
        grid = [
            dict(zip(names, values, strict=True)) for values in itertools.product(*self.parameters.values())
        ]
        if self.trials is None or self.trials >= len(grid):
            return grid
        return random.Random(self.seed).sample(grid, self.trials)


@dataclass(frozen=True)
class Trial:
    """One finished run of a sweep.

    Attributes:
        number: Of the point, from 1.
        budget: Of the round.
        changes: What the point changes in the config.
        value: The metric; None where the run failed.
        seconds: Wall-clock time.
        directory: Of the run, in that of the sweep.
        error: Why it failed.
    """

    number: int
    budget: float
    changes: Mapping[str, Any]
    value: float | None
    seconds: float
    directory: str
    error: str | None = None


def run_sweep(
    sweep: Sweep,
    config: Mapping[str, Any],
    directory: str | Path,
    run: Run,
    *,
    report: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Runs a sweep, or what is left of it, one run after the other.

    Args:
        sweep: What to try.
        config: The config that the points change.
        directory: Holds the sweep's state and the directory of each run, "trial_003/epochs_1".
        run: Trains with a config in a directory, which is new or was left by a run that was stopped, and
            returns the metric.
        report: Called after each run.

    Returns:
        All trials, the best of the last round first, then the rest by budget and value.

    Raises:
        UserError: The directory holds another sweep, a parameter is no field of the config, or every run of
            a round failed.
    """
    directory = Path(directory)
    write_json(directory / "sweep.json", check(sweep, config, directory))
    points = sweep.points()
    done = {(trial.number, trial.budget): trial for trial in finished(directory)}
    alive = list(range(1, len(points) + 1))
    sign = 1 if sweep.better == "lower" else -1
    for round_, budget in enumerate(sweep.budgets):
        for number in alive:
            if (number, budget) not in done:
                trial = _run_one(sweep, config, directory, run, number, points[number - 1], budget)
                done[number, budget] = trial
                write_lines(directory / JOURNAL, map(asdict, done.values()))
                if report is not None:
                    report(trial)
        values = {number: done[number, budget].value for number in alive}
        ranked = sorted((sign * value, number) for number, value in values.items() if value is not None)
        if not ranked:
            errors = {done[number, budget].error for number in alive}
            raise UserError(
                f"every run failed, for example with: {sorted(map(str, errors))[0]}",
                where=str(directory),
                remedy="correct the config, and remove sweep.jsonl to try again.",
            )
        if round_ + 1 < len(sweep.budgets):
            alive = sorted(number for _, number in ranked[: max(1, len(alive) // sweep.keep)])
    trials = sorted(
        done.values(),
        key=lambda trial: (
            -trial.budget,
            math.inf if trial.value is None else sign * trial.value,
            trial.number,
        ),
    )
    write_text(directory / "sweep.svg", plot(sweep, trials))
    return trials


def _run_one(
    sweep: Sweep,
    config: Mapping[str, Any],
    directory: Path,
    run: Run,
    number: int,
    changes: Mapping[str, Any],
    budget: float,
) -> Trial:
    changed = with_changes(config, {**changes, sweep.budget_field: budget})
    workdir = Path(f"trial_{number:03d}") / f"{sweep.budget_field.rpartition('.')[2]}_{budget:g}"
    start = time.perf_counter()
    value, error = None, None
    try:
        value = run(changed, directory / workdir)
    except Exception as failure:  # one point that does not fit in memory must not end the others
        if is_full(failure):
            raise
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    if error is None and (value is None or not math.isfinite(value)):
        value, error = None, f"the metric is {value}"
    seconds = time.perf_counter() - start
    return Trial(number, budget, dict(changes), value, seconds, workdir.as_posix(), error)


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested config with dotted fields replaced.

    Raises:
        UserError: A field is not in the config.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for name, value in changes.items():
        *groups, field = name.split(".")
        place: Any = changed
        for group in groups:
            place = place.get(group) if isinstance(place, Mapping) else None
        if not isinstance(place, dict) or field not in place:
            raise UserError("there is no such config field to change", where=name)
        place[field] = value
    return changed


def check(sweep: Sweep, config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Whether a sweep can run, or go on, in a directory; creates nothing.

    Returns:
        What `sweep.json` holds of it.

    Raises:
        UserError: The directory holds another sweep, or one of another config, or a parameter is no field of
            the config.
    """
    for point in sweep.points()[:1]:
        with_changes(config, {**point, sweep.budget_field: sweep.budgets[0]})
    claimed = directory / "sweep.json"
    mine = json.loads(json.dumps(finite({"sweep": asdict(sweep), "config": config})))
    before = read_json(claimed) if claimed.exists() else mine
    if before["sweep"] != mine["sweep"]:
        raise UserError(
            "the directory holds another sweep",
            where=str(directory),
            remedy="give another --workdir, or the sweep that was started there.",
        )
    began, now = dict(flatten(before["config"])), dict(flatten(mine["config"]))
    for name in (*now, *began):
        if began.get(name) != now.get(name):
            raise UserError(
                f"was {began.get(name)!r} when the sweep started and is {now.get(name)!r} now",
                where=name,
                remedy="go on with the config it was started with, or give another --workdir.",
            )
    return mine


def finished(directory: Path) -> list[Trial]:
    """The runs of a sweep that are over, failed ones included, in their order."""
    journal = directory / JOURNAL
    return [Trial(**record) for record in read_lines(journal)] if journal.exists() else []


def sweep_table(sweep: Sweep, trials: Sequence[Trial]) -> Table:
    """A rich table of the trials in the order given."""
    from rich.table import Table

    table = Table(title=f"{sweep.metric}, {sweep.better} is better", title_justify="left")
    for column in ("trial", *sweep.parameters, sweep.budget_field, sweep.metric, "seconds"):
        table.add_column(column, justify="right")
    for trial in trials:
        value = "failed" if trial.value is None else f"{trial.value:.4f}"
        settings = (f"{trial.changes[name]}" for name in sweep.parameters)
        table.add_row(str(trial.number), *settings, f"{trial.budget:g}", value, f"{trial.seconds:.1f}")
    return table


def plot(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """An SVG of the metric over the budget, one line per point; the winner is thick and named."""
    from keras_gemma_ft.evaluate.plots import svg_figure

    with svg_figure("sweep") as (axes, svg):
        for number in sorted({trial.number for trial in trials}):
            own = sorted((t.budget, t.value) for t in trials if t.number == number and t.value is not None)
            if not own:
                continue
            budgets, values = zip(*own, strict=True)
            best = number == trials[0].number
            axes.plot(
                budgets,
                values,
                marker="o",
                color="#123a6b" if best else "#9aa7b5",
                linewidth=2.4 if best else 0.9,
            )
            axes.annotate(
                str(number), (budgets[-1], values[-1]), xytext=(5, 0), textcoords="offset points", fontsize=9
            )
        settings = ", ".join(f"{name} {value}" for name, value in trials[0].changes.items())
        axes.set_title(f"best: trial {trials[0].number} ({settings})", fontsize=9, loc="left")
        axes.set_xlabel(sweep.budget_field)
        axes.set_ylabel(sweep.metric)
    return svg[0]
