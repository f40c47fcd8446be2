"""The trials of a sweep as training runs, one after the other in this process.

DIR/
  sweep.json  sweep.jsonl  sweep.svg
  data/                       prepared once, unless the sweep changes what rows follow from
  trial_001/epochs_1/         a run directory like any other, and output.txt: what it printed
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from keras_gemma_ft.config import config_from, flatten, known
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.recipes import read_sweep
from keras_gemma_ft.train import run
from keras_gemma_ft.train import workdir as directory
from keras_gemma_ft.train.examples import prepare_examples
from keras_gemma_ft.train.interruption import Interrupted
from keras_gemma_ft.train.progress import duration
from keras_gemma_ft.train.sweep import Sweep, Trial, check, finished, run_sweep, sweep_table, with_changes

# What rows follow from, besides all of `data`: see `prepare_examples`.
_ROWS_FOLLOW_FROM = ("preset", "seed", "task.kind")


def main(config: ConfigDict, name: str, workdir: str | Path) -> list[Trial]:
    """Runs a sweep in `workdir`, or what is left of one that was stopped there.

    A run that was stopped goes on after its last checkpoint. The value of a run is its best held-out loss.

    Args:
        config: What the trials change.
        name: Of the sweep, as `read_sweep` takes it.
        workdir: Holds the sweep's state and its runs.

    Returns:
        All trials, the best one first.

    Raises:
        UserError: The sweep does not fit the config, the data are at fault, the directory cannot be used, or
            every run of a round failed. Nothing was trained, but for the last.
        Interrupted: SIGINT or SIGTERM came; the run under way is saved.
    """
    # ------------------------------------------------------------------ sweep
    sweep, file = _read(name)
    values = config.to_dict()
    _require_fit(sweep, values, file)

    # ------------------------------------------------------------------ place and data
    place = directory.check(workdir, resume=False)
    check(sweep, values, place)
    shared = None if _changes_rows(sweep) else place / "data"
    if shared is not None:
        with directory.nothing_half_written(place):
            prepare_examples(config, shared, print)

    # ------------------------------------------------------------------ runs
    stop: list[int] = []

    def train(changed: dict[str, Any], run_place: Path) -> float | None:
        gc.collect()  # the model of the run before, which reference cycles keep: two may not fit
        print(_title(sweep, changed, run_place.relative_to(place)), end=": ", flush=True)
        run_place.mkdir(parents=True, exist_ok=True)
        resume = (run_place / "config.json").exists()
        try:
            with (run_place / "output.txt").open("a", encoding="utf-8") as output, redirect_stdout(output):
                result = run.main(config_from(changed), run_place, resume=resume, data=shared)
        except Interrupted as interrupted:
            print()
            step = str(interrupted).splitlines()[0]  # what comes after it is the command for the run alone
            raise Interrupted(step, interrupted.signal) from interrupted
        stop[:] = [result.signal] if result.signal else []
        return result.best.eval_loss

    def report(trial: Trial) -> None:
        value = f"failed, {trial.error}" if trial.value is None else f"{trial.value:.4f}"
        print(f"{value} ({duration(trial.seconds)})")
        if stop:  # it came with the run's last step
            raise Interrupted(f"Stopped after {trial.directory}, which is finished.", stop[0])

    _announce(sweep, place)
    trials = run_sweep(sweep, values, place, train, report=report)

    # ------------------------------------------------------------------ result
    from rich.console import Console

    Console().print(sweep_table(sweep, trials))
    print(f"best: {place / trials[0].directory}\n{place / 'sweep.svg'}")
    return trials


def _read(name: str) -> tuple[Sweep, Path]:
    sweep, file = read_sweep(name)
    if not isinstance(sweep, Sweep):
        raise UserError(
            f"get_sweep() returned {type(sweep).__name__}",
            where=str(file),
            remedy="return a keras_gemma_ft.train.sweep.Sweep.",
        )
    if (sweep.metric, sweep.better) != (Sweep.metric, Sweep.better):
        raise UserError(
            f"runs are compared by {Sweep.metric}, of which {Sweep.better} is better",
            where=f"{file}: metric, better",
            remedy="leave both out.",
        )
    return sweep, file


def _require_fit(sweep: Sweep, values: Mapping[str, Any], file: Path) -> None:
    """Checks the config of every run that there can be."""
    try:
        for name in (*sweep.parameters, sweep.budget_field):
            known(name)
        for point in sweep.points():
            for budget in sweep.budgets:
                config_from(with_changes(values, {**point, sweep.budget_field: budget}))
    except UserError as error:
        raise UserError(error.what, f"{file}: {error.where}", error.remedy) from error


def _changes_rows(sweep: Sweep) -> bool:
    return any(
        name.startswith("data.") or name in _ROWS_FOLLOW_FROM
        for name in (*sweep.parameters, sweep.budget_field)
    )


def _announce(sweep: Sweep, place: Path) -> None:
    budgets = ", ".join(f"{budget:g}" for budget in sweep.budgets)
    print(
        f"{len(sweep.points())} trials by {sweep.metric}, {sweep.budget_field} {budgets}. "
        "What each run prints is in its output.txt. Ctrl-C stops after the step under way."
    )
    if done := len(finished(place)):
        print(f"finished before: {done}")


def _title(sweep: Sweep, changed: Mapping[str, Any], run_place: Path) -> str:
    fields = dict(flatten(changed))
    return "  ".join([str(run_place), *(f"{name} {fields[name]}" for name in sweep.parameters)])
