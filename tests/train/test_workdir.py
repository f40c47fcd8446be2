"""The run directory: refused before anything is written, and the same run on resume."""

import os

import jax
import pytest

from keras_gemma_ft.config import default_config
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.json_files import write_json
from keras_gemma_ft.train import workdir


def run_config(**changes):
    config = default_config()
    config.data.train = "train.jsonl"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def test_a_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/deeper/run"):
        with pytest.raises(UserError, match="is a file") as error:
            workdir.check(tmp_path / place, resume=False)
        assert error.value.where == f"--workdir={tmp_path / place}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="not writable"):
        workdir.check(tmp_path / "run", resume=False)


def test_a_run_is_neither_overwritten_nor_invented(tmp_path):
    assert workdir.check(tmp_path / "a" / "b", resume=False) == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no run to resume"):
        workdir.check(tmp_path, resume=True)
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="holds a run already\n  add --resume"):
        workdir.check(tmp_path, resume=False)
    assert workdir.check(tmp_path, resume=True) == tmp_path


def test_a_resumed_run_is_the_same_run(tmp_path):
    write_json(tmp_path / "config.json", run_config().to_dict())
    workdir.check_same_config(tmp_path, run_config())
    workdir.check_same_config(tmp_path, run_config(train__eval_every=5, train__remat="none"))
    with pytest.raises(UserError, match="was 16 when the run started and is 32 now") as error:
        workdir.check_same_config(tmp_path, run_config(lora__rank=32))
    assert error.value.where == "lora.rank"


@pytest.mark.parametrize("index", [0, 1])
def test_the_first_of_several_processes_writes(index, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    workdir.record(tmp_path / "manifest.json", {"status": "running"})
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"][index:]


def test_what_a_failed_start_made_is_gone(tmp_path):
    place = tmp_path / "runs" / "first"
    with pytest.raises(KeyError), workdir.nothing_half_written(place):
        (place / "data" / "train").mkdir(parents=True)
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    place.mkdir(parents=True)
    (place / "notes.txt").touch()
    with pytest.raises(KeyError), workdir.nothing_half_written(place):
        (place / "data").mkdir()
        raise KeyError
    assert [path.name for path in place.iterdir()] == ["notes.txt"]
