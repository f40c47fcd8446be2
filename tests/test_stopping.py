"""What ends a verb from outside: the code and the words of it, and what is left behind."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from keras_gemma_ft import cli, json_files

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
CTRL_C = "Stopped at once."


def ends(monkeypatch, verb, error):
    """Lets the verb's work end so."""

    def work(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli, "_function", lambda module, name="main": work)
    return verb


def arguments(verb, workdir):
    return [
        *verb.split(),
        *(["--config=tiny"] if cli.VERBS[verb].takes_config else []),
        f"--workdir={workdir}",
    ]


def a_run(directory):
    """As much of one as the command line looks at."""
    json_files.write_json(directory / "config.json", {"data": {"train": "train.jsonl"}})
    return directory


@pytest.mark.parametrize("verb", ["data prepare", "train", "export"])
def test_a_full_disk_is_named_with_the_command_that_goes_on(verb, tmp_path, monkeypatch, capsys):
    given = arguments(ends(monkeypatch, verb, FULL), a_run(tmp_path))
    assert cli.main(given) == 2
    again = f"train --workdir={tmp_path} --resume" if verb == "train" else " ".join(given)
    assert capsys.readouterr().err == (
        f"keras-gemma-ft: {tmp_path}: the disk is full\n  make room there, then: keras-gemma-ft {again}\n"
    )


def test_other_faults_of_a_device_are_no_users_error(tmp_path, monkeypatch):
    given = arguments(ends(monkeypatch, "train", OSError(errno.EIO, "Input/output error")), tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        cli.main(given)


def test_a_file_that_finds_no_room_leaves_the_one_before_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    json_files.write_json(path, {"step": 1})

    def replace(source, target):
        raise FULL

    monkeypatch.setattr(json_files.os, "replace", replace)
    with pytest.raises(OSError, match="No space left") as caught:
        json_files.write_json(path, {"step": 2})
    assert caught.value.filename == str(path)
    assert json_files.read_json(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def loading_a_library():
    error = ImportError("Encountered an error while initializing the extension.")
    error.__cause__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), loading_a_library()], ids=["anywhere", "import"])
def test_ctrl_c_says_how_to_go_on_and_is_no_traceback(error, tmp_path, monkeypatch, capsys):
    given = arguments(ends(monkeypatch, "train", error), tmp_path)
    assert cli.main(given) == 130
    assert capsys.readouterr().err.split("\n")[1:] == [
        CTRL_C,
        f"Go on with: keras-gemma-ft {' '.join(given)}",  # there is nothing yet to resume
        "",
    ]
    a_run(tmp_path)
    assert cli.main(given) == 130
    assert f"Go on with: keras-gemma-ft train --workdir={tmp_path} --resume\n" in capsys.readouterr().err


def test_a_library_that_is_missing_is_not_ctrl_c(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match="no such library"):
        cli.main(arguments(ends(monkeypatch, "train", ImportError("no such library")), tmp_path))


DROPPED = """
import gc, signal, time
from keras_gemma_ft.stopping import never_lose_interrupts

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with it ignored
never_lose_interrupts()
def callback(phase, info):
    gc.callbacks.clear()
    signal.raise_signal(signal.SIGINT)
gc.callbacks.append(callback)
gc.collect()
print("dropped", flush=True)
time.sleep(100)
"""


def test_ctrl_c_while_python_collects_garbage_counts():
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 60  # of the 100 s that it would wait
    assert result.stdout == "dropped\n"
    assert result.returncode == -signal.SIGINT
    assert result.stderr.endswith("KeyboardInterrupt\n")
