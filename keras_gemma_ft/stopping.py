"""What ends a verb from outside, Ctrl-C or a full disk: how it is noticed, and how one goes on."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_gemma_ft.errors import UserError


def never_lose_interrupts() -> None:
    """Ctrl-C counts whenever it comes, for the rest of this process.

    Python drops an exception that is raised in a callback of its garbage collector, such as JAX's, and Ctrl-C
    raises wherever Python happens to be; it is then raised again.
    """

    main = threading.main_thread().ident
    assert main is not None, "it has been started"

    def report(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            # Later and from elsewhere: here it would be dropped once more. A signal also ends waiting calls.
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(dropped)

    sys.unraisablehook = report


def is_interrupt(error: BaseException) -> bool:
    """Whether that was Ctrl-C; what comes while a library of C++ is loaded is an ImportError."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)


def go_on(program: str, verb: str, arguments: Sequence[str]) -> str:
    """The command that goes on with what was stopped.

    Args:
        program: Its name.
        verb: That was stopped.
        arguments: All that it was called with, verb included.
    """
    workdir = _workdir(arguments)
    if verb == "train" and workdir and (Path(workdir).expanduser() / "config.json").is_file():
        return shlex.join([program, verb, f"--workdir={workdir}", "--resume"])
    return shlex.join([program, *arguments])


def disk_full(error: OSError, command: str, arguments: Sequence[str]) -> UserError:
    """What to say where there is no room.

    Args:
        error: Has no file's name where something is written as it comes, as metrics are.
        command: That goes on.
        arguments: Of the command line.
    """
    where = error.filename or _workdir(arguments)
    return UserError("the disk is full", where=where, remedy=f"make room there, then: {command}")


def _workdir(arguments: Sequence[str]) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, given, value = argument.partition("=")
        if name.lstrip("-") == "workdir":
            return value if given else following
    return None
