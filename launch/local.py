"""Runs a verb on this machine and keeps it running: chosen devices, a log file, and resuming after a crash.

    python launch/local.py --devices=0 --restarts=3 train --config=e4b_lora --workdir=runs/a

Everything after the launcher's own flags is the command line of `keras-gemma-ft`, unchanged. Its output goes
to the terminal and to `WORKDIR.log`. If a training process dies (but not if the user stopped it, or gave it
something wrong), it is started again with --resume.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# 2: a fault in what was given; 130 and 143: stopped by the user or the system, and saved.
FINAL = (0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def command(arguments: Sequence[str]) -> list[str]:
    """The process to start: this Python, and the verb; with --resume where the workdir holds a run."""
    workdir = workdir_of(arguments)
    has_run = workdir is not None and (workdir / "config.json").exists()
    resume = ["--resume"] if has_run and arguments[0] == "train" and "--resume" not in arguments else []
    return [sys.executable, "-m", "keras_gemma_ft", *arguments, *resume]


def environment(devices: str | None, base: Mapping[str, str]) -> dict[str, str]:
    """The process's environment: only the GPUs that were chosen, by number with commas; None: all."""
    chosen = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {**base, **chosen}


def workdir_of(arguments: Sequence[str]) -> Path | None:
    """The value of --workdir."""
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith("--workdir=")]
    return Path(values[-1]) if values else None


def launch(arguments: Sequence[str], *, devices: str | None = None, restarts: int = 0) -> int:
    """Runs the verb, again after each crash up to `restarts` times, and returns the last exit code."""
    workdir = workdir_of(arguments)
    log = workdir.with_name(f"{workdir.name}.log") if workdir is not None else Path(os.devnull)
    for attempt in range(restarts + 1):
        code = _run(command(arguments), environment(devices, os.environ), log)
        if code in FINAL or arguments[0] != "train":
            return code
        if attempt < restarts:
            print(f"ended with {code}; starting again ({attempt + 1} of {restarts})", file=sys.stderr)
    return code


def _run(process: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("ab") as file,
        subprocess.Popen(
            process, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as running,
    ):
        # Ctrl-C reaches the child by itself, being in the same group; what is sent to us alone is passed on.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        terminated = signal.signal(signal.SIGTERM, lambda number, frame: running.send_signal(number))
        try:
            assert running.stdout is not None
            for line in running.stdout:
                sys.stdout.buffer.write(line)
                sys.stdout.flush()
                file.write(line)
        finally:
            signal.signal(signal.SIGINT, before)
            signal.signal(signal.SIGTERM, terminated)
        return running.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", help="GPUs to use, by number with commas; all by default")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again after a crash")
    parser.add_argument("verb", nargs=argparse.REMAINDER, help="the command line of keras-gemma-ft")
    given = parser.parse_args()
    if not given.verb:
        parser.error("give a verb of keras-gemma-ft, such as train")
    sys.exit(launch(given.verb, devices=given.devices, restarts=given.restarts))


if __name__ == "__main__":
    main()
