"""Successive halving with a function whose optimum is known; interrupted, failing and wrongly set up."""

import errno
import io
import json
import math
from xml.etree import ElementTree

import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.train.sweep import Sweep, run_sweep, sweep_table, with_changes

CONFIG = {"lora": {"rank": 16, "dropout": 0.05}, "train": {"learning_rate": 2e-4, "epochs": 3}, "seed": 0}
SWEEP = Sweep({"lora.rank": [8, 16, 32], "train.learning_rate": [1e-4, 2e-4, 4e-4]}, budgets=[1, 2, 4])


class Runs:
    """Loss with its optimum at rank 16 and 2e-4, which longer runs approach; counts its calls."""

    def __init__(self, fail=()):
        self.calls, self.fail = [], fail

    def __call__(self, config, workdir):
        rank, rate, epochs = (
            config["lora"]["rank"],
            config["train"]["learning_rate"],
            config["train"]["epochs"],
        )
        self.calls.append((rank, rate, epochs, workdir))
        if rank in self.fail:
            raise MemoryError(f"rank {rank} does not fit")
        return abs(math.log2(rank / 16)) + 2 * abs(math.log2(rate / 2e-4)) + 1 / epochs


def test_halving_finds_the_optimum_with_few_long_runs(tmp_path):
    runs = Runs()
    trials = run_sweep(SWEEP, CONFIG, tmp_path, runs)
    assert trials[0].changes == {"lora.rank": 16, "train.learning_rate": 2e-4}
    assert trials[0].value == pytest.approx(0.25)
    assert [epochs for *_, epochs, _ in runs.calls] == [1] * 9 + [2] * 3 + [4]
    assert len({workdir for *_, workdir in runs.calls}) == 13  # each run has its own directory
    assert runs.calls[-1][3] == tmp_path / "trial_005" / "epochs_4"
    assert CONFIG["train"]["epochs"] == 3
    ElementTree.parse(tmp_path / "sweep.svg")


def test_higher_can_be_better(tmp_path):
    sweep = Sweep({"lora.rank": [8, 16, 32]}, budgets=[1, 2], better="higher", metric="accuracy")
    trials = run_sweep(sweep, CONFIG, tmp_path, lambda config, workdir: config["lora"]["rank"] / 100)
    assert trials[0].changes == {"lora.rank": 32}


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    whole = run_sweep(SWEEP, CONFIG, tmp_path / "whole", Runs())

    class Interrupted(Runs):
        def __call__(self, config, workdir):
            if len(self.calls) == 10:
                raise KeyboardInterrupt
            return super().__call__(config, workdir)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(SWEEP, CONFIG, tmp_path / "cut", Interrupted())
    rest = Runs()
    resumed = run_sweep(SWEEP, CONFIG, tmp_path / "cut", rest)
    assert len(rest.calls) == 3
    key = [(trial.number, trial.budget, trial.value) for trial in whole]
    assert [(trial.number, trial.budget, trial.value) for trial in resumed] == key
    again = Runs()
    run_sweep(SWEEP, CONFIG, tmp_path / "cut", again)
    assert again.calls == []


def test_a_run_that_fails_is_recorded_and_passed_over(tmp_path):
    trials = run_sweep(SWEEP, CONFIG, tmp_path, Runs(fail=(32,)))
    failed = [trial for trial in trials if trial.error]
    assert {trial.changes["lora.rank"] for trial in failed} == {32}
    assert failed[0].error == "MemoryError: rank 32 does not fit"
    assert trials[0].value is not None
    nan = run_sweep(
        Sweep({"lora.rank": [8, 16]}, budgets=[1]),
        CONFIG,
        tmp_path / "nan",
        lambda config, workdir: math.nan if config["lora"]["rank"] == 8 else 1.0,
    )
    assert (nan[-1].value, nan[-1].error) == (None, "the metric is nan")


def test_a_full_disk_ends_the_sweep_and_is_no_failure_of_a_run(tmp_path):
    def full(config, workdir):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_sweep(SWEEP, CONFIG, tmp_path, full)
    new, again = Runs(), Runs()
    run_sweep(SWEEP, CONFIG, tmp_path / "new", new)
    run_sweep(SWEEP, CONFIG, tmp_path, again)  # nothing was recorded, so nothing is passed over
    assert [call[:3] for call in again.calls] == [call[:3] for call in new.calls]


def test_where_every_run_fails_the_reason_is_given(tmp_path):
    with pytest.raises(UserError, match="every run failed, for example with: MemoryError: rank 16"):
        run_sweep(SWEEP, CONFIG, tmp_path, Runs(fail=(8, 16, 32)))


def test_trials_are_drawn_from_the_grid_by_seed():
    sweep = Sweep(SWEEP.parameters, trials=4, seed=1)
    assert sweep.points() == Sweep(SWEEP.parameters, trials=4, seed=1).points()
    assert len(sweep.points()) == 4
    assert all(point in SWEEP.points() for point in sweep.points())


def test_another_sweep_in_the_same_directory_is_refused(tmp_path):
    run_sweep(SWEEP, CONFIG, tmp_path, Runs())
    with pytest.raises(UserError, match="holds another sweep"):
        run_sweep(Sweep({"lora.rank": [8]}), CONFIG, tmp_path, Runs())
    with pytest.raises(UserError, match="seed: was 0 when the sweep started and is 1 now"):
        run_sweep(SWEEP, {**CONFIG, "seed": 1}, tmp_path, Runs())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {}}, r"sweep\.parameters: there is nothing to try"),
        (
            {"parameters": {"lora.rank": 16}},
            r"sweep\.parameters: the values of lora\.rank are 16, not a list",
        ),
        ({"parameters": {"lora.targets": "q_proj"}}, "not a list"),
        ({"parameters": {"lora.rank": []}}, r"sweep\.parameters: there is nothing to try"),
        ({"parameters": {"train.epochs": [1, 2]}}, "is the budget"),
        ({"parameters": {"lora.rank": [8]}, "budgets": [3, 1]}, "budgets must increase"),
        ({"parameters": {"lora.rank": [8]}, "keep": 1}, r"sweep\.keep"),
        ({"parameters": {"lora.rank": [8]}, "trials": 0}, r"sweep\.trials"),
    ],
)
def test_faulty_sweeps_are_the_users_error(fields, message):
    with pytest.raises(UserError, match=message):
        Sweep(**fields)


def test_a_misspelt_field_is_refused_before_anything_runs(tmp_path):
    runs = Runs()
    with pytest.raises(UserError, match=r"lora\.rnak: there is no such config field"):
        run_sweep(Sweep({"lora.rnak": [8]}), CONFIG, tmp_path / "x", runs)
    assert runs.calls == []
    assert not (tmp_path / "x").exists()
    assert with_changes(CONFIG, {"seed": 5})["seed"] == 5


def test_the_table_and_the_journal(tmp_path):
    from rich.console import Console

    trials = run_sweep(SWEEP, CONFIG, tmp_path, Runs(fail=(32,)))
    console = Console(file=io.StringIO(), width=120)
    console.print(sweep_table(SWEEP, trials))
    text = console.file.getvalue()
    assert "0.2500" in text
    assert "failed" in text
    assert "lora.rank" in text
    journal = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert len(journal) == len(trials)
