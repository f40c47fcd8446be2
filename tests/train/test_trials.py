"""The sweep verb: runs of a toy model on real rows, stopped and gone on with, and what is refused before."""

import json
import os
import signal
from pathlib import Path

import keras
import pytest
import toy_model
from toy_run import SendAt

from keras_gemma_ft import checkpoint, cli
from keras_gemma_ft.model import from_config
from keras_gemma_ft.recipes import shipped_sweeps
from keras_gemma_ft.train import run
from keras_gemma_ft.train.sweep import Sweep
from keras_gemma_ft.train.trials import _changes_rows

HEAD = "from keras_gemma_ft.train.sweep import Sweep\n\ndef get_sweep():\n    return "
SWEEP = HEAD + 'Sweep({"train.learning_rate": [1e-3, 0.05]}, budgets=[1, 2], keep=2)\n'


class StopAtOnce(keras.callbacks.Callback):
    """Ends the run as a kill does: nothing is saved, nothing is said."""

    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


class Project:
    """A folder with rows and a sweep, and the command that runs it."""

    def __init__(self, folder: Path, sweep: str = SWEEP) -> None:
        self.folder = folder
        rows = [{"prompt": f"What comes after {n}?", "response": f"{n + 1} does."} for n in range(24)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "sweep.py").write_text(sweep)
        self.place = folder / "runs" / "sweep"

    def arguments(self, sweep: str | None = None) -> list[str]:
        return [
            "sweep",
            "--config=tiny",
            f"--sweep={sweep or self.folder / 'sweep.py'}",
            f"--workdir={self.place}",
            f"--config.data.train={self.folder / 'train.jsonl'}",
            "--config.data.max_length=32",
            "--config.train.batch_size=8",
            "--config.train.eval_every=2",
            "--noconfig.data.packing",
        ]

    def run(self) -> int:
        return cli.main(self.arguments())

    def trials(self) -> list[dict]:
        return [json.loads(line) for line in (self.place / "sweep.jsonl").read_text().splitlines()]

    def values(self) -> list[tuple]:
        return [(trial["directory"], trial["value"]) for trial in self.trials()]


@pytest.fixture(scope="module", autouse=True)
def fits():
    """Every model is the toy. Run directories in order; callbacks in `stops`, by the number of the run."""

    class Fits(list):
        def __init__(self):
            super().__init__()
            self.stops = {}

    calls, real = Fits(), run.fit

    def fit(model, examples, config, workdir, **options):
        calls.append((Path(workdir), options["resume"]))
        return real(model, examples, config, workdir, callbacks=calls.stops.pop(len(calls), []), **options)

    def build_model(config):
        keras.utils.set_random_seed(config.seed)
        return toy_model.ToyModel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_model, "VOCABULARY", 8192)
        patch.setattr(from_config, "build_model", build_model)
        patch.setattr(run, "fit", fit)
        patch.setattr(run, "Answers", lambda *_, **__: None, raising=False)  # the toy cannot generate
        yield calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fits):
    """A sweep that was never stopped: its project, and what it printed."""
    project = Project(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, end="\n", **_: printed.append(" ".join(words) + end))
        assert project.run() == 0
    return project, "".join(printed), [place for place, _ in fits]


def test_the_better_setting_is_found_and_trained_longer(whole):
    project, _, places = whole
    runs = ["trial_001/epochs_1", "trial_002/epochs_1", "trial_002/epochs_2"]
    assert [place.relative_to(project.place).as_posix() for place in places] == runs
    first, second, longer = project.trials()
    assert longer["changes"] == {"train.learning_rate": 0.05}
    assert longer["value"] < second["value"] < first["value"]
    for trial in project.trials():
        best = checkpoint.find(project.place / trial["directory"] / "checkpoints", "best")
        assert best.eval_loss == trial["value"]


def test_it_prints_a_line_for_each_run_and_says_where_the_rest_is(whole):
    project, printed, _ = whole
    lines = printed.splitlines()
    for trial in project.trials():
        title = f"{trial['directory']}  train.learning_rate {trial['changes']['train.learning_rate']}: "
        (line,) = [line for line in lines if line.startswith(title)]
        assert line.removeprefix(title).startswith(f"{trial['value']:.4f} (")
        output = (project.place / trial["directory"] / "output.txt").read_text()
        assert "compiled the training step" in output
        assert "step 1/" in output
    assert lines[-2:] == [f"best: {project.place / 'trial_002/epochs_2'}", str(project.place / "sweep.svg")]
    assert "<svg" in (project.place / "sweep.svg").read_text()


def test_data_are_prepared_once(whole):
    project, _, _ = whole
    assert {path.name for path in (project.place / "data").iterdir()} == {"train", "held_out"}
    assert not list(project.place.glob("trial_*/*/data"))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("data.max_length", True),
        ("seed", True),
        ("preset", True),
        ("lora.rank", False),
        ("train.epochs", False),
    ],
)
def test_rows_are_shared_unless_the_sweep_changes_them(field, changes):
    budget = "train.max_steps" if field == "train.epochs" else "train.epochs"
    assert _changes_rows(Sweep({field: [1, 2]}, budget_field=budget)) is changes


def test_stopped_and_killed_it_goes_on_and_ends_the_same(whole, fits, tmp_path, capsys):
    project = Project(tmp_path)
    fits.clear()
    fits.stops = {1: [SendAt(signal.SIGINT, 2)], 2: [SendAt(signal.SIGTERM, 1)], 3: [StopAtOnce()]}
    assert project.run() == 130
    said = capsys.readouterr().err
    assert "Stopped after step 2 of 3; the run is saved.\n" in said
    assert f"Go on with: keras-gemma-ft {' '.join(project.arguments())}" in said
    assert "train --workdir" not in said
    assert not (project.place / "sweep.jsonl").exists()

    assert project.run() == 143  # the signal comes with the last step: the run is over
    said = capsys.readouterr().err
    assert "Stopped after trial_001/epochs_1, which is finished.\nGo on with: keras-gemma-ft sweep" in said
    assert [trial["directory"] for trial in project.trials()] == ["trial_001/epochs_1"]

    assert project.run() == 130  # the second run is ended before it saved anything
    assert "Go on with: keras-gemma-ft sweep" in capsys.readouterr().err
    assert len(project.trials()) == 1
    assert (project.place / "trial_002/epochs_1/config.json").exists()

    assert project.run() == 0
    assert "finished before: 1\n" in capsys.readouterr().out
    assert project.values() == whole[0].values()
    assert [(place.relative_to(project.place).as_posix(), resumed) for place, resumed in fits] == [
        ("trial_001/epochs_1", False),
        ("trial_001/epochs_1", True),
        ("trial_002/epochs_1", False),
        ("trial_002/epochs_1", True),
        ("trial_002/epochs_2", False),
    ]

    fits.clear()
    assert project.run() == 0  # nothing is left to do
    assert fits == []


def test_another_sweep_in_the_directory_is_refused(whole, capsys):
    project = whole[0]
    before = sorted(os.walk(project.place))
    assert cli.main([*project.arguments(), "--config.train.weight_decay=0.1"]) == 2
    assert "train.weight_decay: was 0.0 when the sweep started and is 0.1 now" in capsys.readouterr().err
    assert sorted(os.walk(project.place)) == before


@pytest.mark.parametrize(
    ("body", "place", "says"),
    [
        ('Sweep({"lora.rnak": [8]})', "sweep.py: lora.rnak", "did you mean lora.rank?"),
        ('Sweep({"lora.rank": [8, 0]})', "sweep.py: lora.rank", "1 or more"),
        ('Sweep({"lora.rank": [8, "16"]})', "sweep.py: lora.rank", "not a whole number"),
        ('Sweep({"lora.rank": 8})', "sweep.parameters", "not a list"),
        ('Sweep({"lora.rank": [8]}, budgets=[0.5, 1])', "sweep.py: train.epochs", "not a whole number"),
        (
            'Sweep({"lora.rank": [8]}, budget_field="epochs")',
            "sweep.py: epochs",
            "did you mean train.epochs?",
        ),
        ('Sweep({"train.micro_batch_size": [2, 3]})', "sweep.py: train.micro_batch_size", "does not divide"),
        (
            'Sweep({"lora.rank": [8]}, metric="accuracy", better="higher")',
            "sweep.py: metric",
            "held-out loss",
        ),
        ('{"lora.rank": [8]}', "sweep.py", "get_sweep() returned dict"),
        ("Swipe()", "sweep.py:4", "NameError"),
    ],
)
def test_a_faulty_sweep_is_refused_before_anything_runs(body, place, says, tmp_path, capsys):
    project = Project(tmp_path, HEAD + body + "\n")
    assert project.run() == 2
    assert_refused(project, place, says, capsys.readouterr())


def test_a_sweep_that_is_not_there_is_refused(tmp_path, capsys):
    project = Project(tmp_path)
    assert cli.main(project.arguments("rank_and_rat")) == 2
    assert_refused(project, "--sweep=rank_and_rat", "did you mean rank_and_rate?", capsys.readouterr())
    assert cli.main([flag for flag in project.arguments() if not flag.startswith("--sweep")]) == 2
    assert_refused(project, "--sweep", "add --sweep=", capsys.readouterr())
    (tmp_path / "sweep.py").write_text("x = 1\n")
    assert project.run() == 2
    assert_refused(project, "sweep.py", "defines no get_sweep()", capsys.readouterr())


def test_faulty_data_are_found_before_anything_runs(tmp_path, capsys):
    project = Project(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "Hi", "response": "Hello."}\n{"prompt": \n')
    assert project.run() == 2
    assert_refused(project, "train.jsonl:2", "JSON", capsys.readouterr())


def test_where_every_run_fails_the_reason_is_said(tmp_path, fits, capsys, monkeypatch):
    def build_model(config):
        raise MemoryError("it does not fit")

    monkeypatch.setattr(from_config, "build_model", build_model)
    assert Project(tmp_path).run() == 2
    printed = capsys.readouterr()
    assert "trial_002/epochs_1  train.learning_rate 0.05: failed, MemoryError: it does not fit" in printed.out
    assert "every run failed, for example with: MemoryError: it does not fit" in printed.err


@pytest.mark.parametrize("name", shipped_sweeps())
def test_a_shipped_sweep_fits_every_config_and_says_its_command(name, tmp_path, monkeypatch, capsys):
    def begin(config, directory, tell):
        raise InterruptedError

    monkeypatch.setattr("keras_gemma_ft.train.trials.prepare_examples", begin)
    with pytest.raises(InterruptedError):  # all that is checked beforehand was right
        cli.main(Project(tmp_path).arguments(name))
    text = shipped_sweeps()[name].read_text()
    assert f"keras-gemma-ft sweep --config=e4b_lora --sweep={name} --workdir=runs/" in text


def assert_refused(project, place, says, printed):
    assert len(printed.err.splitlines()) <= 3, printed.err
    assert place in printed.err.splitlines()[0]
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert {path.name for path in project.folder.iterdir()} == {"train.jsonl", "sweep.py"}
