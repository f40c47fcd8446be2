"""Progress: what a person reads, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from keras_gemma_ft.train.progress import TerminalProgress, duration


def records(steps):
    for step in range(1, steps + 1):
        yield {
            "step": step,
            "loss": 3 / step,
            "learning_rate": 2e-4,
            "seconds": 2.0,
            "tokens_per_second": 12345.6,
        }


def test_plain_lines_are_few_and_complete():
    text = io.StringIO()
    progress = TerminalProgress(200, Console(file=text, width=200))
    progress.write({"step": 0, "compile_seconds": 23.4})
    for record in records(200):
        progress.write(record)
    progress.write({"step": 200, "eval_loss": 1.5})
    progress.close()
    lines = text.getvalue().splitlines()
    assert lines[0] == "compiled the training step in 23.4 s"
    assert lines[1] == "step   1/200  loss 3.0000  lr 2.00e-04  12,346 tokens/s  6 min 38 s left"
    assert lines[-1] == "step 200: held-out loss 1.5000"
    assert 20 <= len(lines) <= 25


def test_a_terminal_gets_one_live_line():
    text = io.StringIO()
    progress = TerminalProgress(5, Console(file=text, width=120, force_terminal=True, color_system=None))
    for record in records(5):
        progress.write(record)
    progress.say("a line above")
    progress.close()
    assert "step 5/5" in text.getvalue()
    assert "a line above" in text.getvalue()
    assert "0 s left" in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7810, "2 h 10 min")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
