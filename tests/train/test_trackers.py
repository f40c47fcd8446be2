"""W&B and trackio by modules with their API: what they get, and that none of their faults ends a run."""

import json
import sys
import types

import pytest
import toy_model
import toy_run

from keras_gemma_ft.config import validate
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.run_record import read_run
from keras_gemma_ft.train import run
from keras_gemma_ft.train.trackers import require


class Library(types.ModuleType):
    """`init` → a run with `log` and `finish`, whose parameters are those of wandb 0.31 and trackio 0.43."""

    def __init__(self, name, fail=""):
        super().__init__(name)
        self.fail, self.started, self.rows, self.axes, self.finished = fail, [], [], [], 0
        self.init = self.init_wandb if name == "wandb" else self.init_trackio

    def init_wandb(self, project=None, id=None, name=None, dir=None, config=None, resume=None):
        return self._start(types.SimpleNamespace(log=self.log_wandb, define_metric=self.axis), locals())

    def init_trackio(self, project, name=None, config=None, resume="never"):
        return self._start(types.SimpleNamespace(log=self.log_trackio), locals())

    def _start(self, opened, given):
        if self.fail == "init":
            raise RuntimeError("no network\nand more about it")
        del given["self"]
        self.started.append(given)
        opened.finish = self.finish
        return opened

    def axis(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log_wandb(self, data, step=None, commit=None):
        assert step is None  # it would drop what comes after a resume
        self._keep(data["step"], {name: value for name, value in data.items() if name != "step"})

    def log_trackio(self, metrics, step=None):
        assert "step" not in metrics  # a reserved key
        self._keep(step, metrics)

    def _keep(self, step, values):
        if self.fail == "log" and len(self.rows) == 3:
            raise ConnectionError("the server is gone")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1
        if self.fail == "finish":
            raise TimeoutError("nothing was sent")


@pytest.fixture
def libraries(monkeypatch):
    def install(fail=""):
        made = {name: Library(name, fail) for name in ("wandb", "trackio")}
        for name, library in made.items():
            monkeypatch.setitem(sys.modules, name, library)
        return made

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return install


def train(workdir, names, steps=5, resume=False):
    config = toy_run.config()
    config.train.trackers = names
    config.train.max_steps = steps
    return run.fit(toy_model.ToyModel(), toy_model.examples(), config, workdir, resume=resume)


def test_both_get_the_numbers_of_the_run_and_its_config(libraries, tmp_path):
    made = libraries()
    train(tmp_path / "runs" / "first", "wandb, trackio")
    metrics = read_run(tmp_path / "runs" / "first").metrics
    for library in made.values():
        (given,) = library.started
        assert given["project"] == "keras-gemma-ft"
        assert given["name"].startswith("runs-first-")
        assert given["config"]["train"]["learning_rate"] == 0.05
        assert library.finished == 1
        by_name = {
            name: [(step, values[name]) for step, values in library.rows if name in values]
            for name in ("train/loss", "held_out/loss")
        }
        for name, field in (("train/loss", "loss"), ("held_out/loss", "eval_loss")):
            recorded = [(record["step"], record[field]) for record in metrics if field in record]
            assert by_name[name] == recorded
        assert len(by_name["train/loss"]) == 5
    assert made["wandb"].axes == [("*", "step")]
    assert made["wandb"].started[0]["dir"] == str(tmp_path / "runs" / "first")


def test_a_resumed_run_goes_on_under_its_name(libraries, tmp_path):
    made = libraries()
    for place, resume in (("a", False), ("a", True), ("b", False)):
        train(tmp_path / place, "wandb,trackio", resume=resume)
    for library, key in ((made["wandb"], "id"), (made["trackio"], "name")):
        first, resumed, other = (given[key] for given in library.started)
        assert first == resumed != other
        assert {given["resume"] for given in library.started} == {"allow"}


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        ("init", "RuntimeError: no network"),
        ("log", "ConnectionError: the server is gone"),
        ("finish", "TimeoutError: nothing was sent"),
    ],
)
def test_what_fails_is_said_once_and_the_run_goes_on(fail, reason, libraries, tmp_path, capsys):
    libraries(fail)
    assert train(tmp_path, "wandb,trackio").step == 5
    said = [line for line in capsys.readouterr().out.splitlines() if "records no more" in line]
    assert said == [
        f"{name} records no more ({reason}); the run goes on, and metrics.jsonl has it all"
        for name in ("wandb", "trackio")
    ]
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "finished"
    assert read_run(tmp_path).curve("loss")[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("found", [None, types.ModuleType("a folder")])
def test_a_library_that_is_absent_is_named_before_anything_is_written(name, found, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, found)
    config = toy_run.config()
    config.train.trackers = name
    with pytest.raises(UserError) as error:
        run.main(config, tmp_path / "run")
    assert error.value.where == "train.trackers"
    assert f"pip install 'keras-gemma-ft[{name}]'" in error.value.remedy
    assert len(str(error.value).splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_without_trackers_no_library_is_needed(monkeypatch, tmp_path):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    require("")
    train(tmp_path, "", steps=1)
    assert not (tmp_path / "trackers.json").exists()


def test_another_tracker_is_refused():
    config = toy_run.config()
    for names in ("wandb", "trackio,wandb", " wandb , trackio "):
        config.train.trackers = names
        validate(config)
    config.train.trackers = "wandb,trakio"
    with pytest.raises(UserError, match=r"train\.trackers: 'trakio' is no tracker\n  did you mean trackio\?"):
        validate(config)
