"""Progress in the terminal: a live line where there is one, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from keras_gemma_ft.train.answers import as_line

_LINES = 20  # plain lines of a whole run, about
_QUIET_SECONDS = 30.0  # and one at least this often


class TerminalProgress:
    """Shows step, loss, learning rate, tokens a second and the time left.

    Args:
        total_steps: Of the run.
        console: Where to; None: standard output.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._total = total_steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._recent: deque[float] = deque(maxlen=20)
        self._shown = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def say(self, text: str) -> None:
        """A line above the live one."""
        self._console.print(text, markup=False)

    def write(self, record: dict[str, Any]) -> None:
        if "compile_seconds" in record:
            self.say(f"compiled the training step in {record['compile_seconds']:.1f} s")
        elif "eval_loss" in record:
            values = [
                f"{name.removeprefix('eval_')} {value:.4f}"
                for name, value in record.items()
                if name.startswith("eval_") and name != "eval_tokens"
            ]
            self.say(f"step {record['step']}: held-out {', '.join(values)}")
        elif "samples" in record:
            for sample in record["samples"]:
                self.say(f"  {as_line(sample)}")
        elif "loss" in record:
            self._step(record)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _step(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if "seconds" in record:
            self._recent.append(record["seconds"])
        speed = f"{record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else "…"
        left = duration(statistics.median(self._recent) * (self._total - step)) if self._recent else "…"
        text = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {speed}  {left} left"
        if self._console.is_terminal:
            if self._bar is None:
                columns = (
                    TextColumn("step {task.completed}/{task.total}"),
                    BarColumn(20),
                    TextColumn("{task.description}"),
                )
                self._bar = Progress(*columns, console=self._console, transient=True)
                self._task = self._bar.add_task("", total=self._total)
                self._bar.start()
            self._bar.update(self._task, completed=step, description=text)
            return
        due = step == 1 or step == self._total or step % max(1, self._total // _LINES) == 0
        if due or time.monotonic() - self._shown > _QUIET_SECONDS:
            self._shown = time.monotonic()
            self.say(f"step {step:>{len(str(self._total))}}/{self._total}  {text}")


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
