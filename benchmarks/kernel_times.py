"""Where a program's time goes: its kernels by the milliseconds that they take."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def profiled(run: Callable[[], Any], exact: bool) -> dict[str, Any]:
    """Milliseconds and calls by kernel, the longest first; summed over threads where the device is a CPU.

    Args:
        run: Does once what is profiled.
        exact: Kernels by their full names, as the compiled program has them; else without their numbers.
    """
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        times: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
        for event in _kernels(jax.profiler.ProfileData.from_file(str(path))):
            entry = times[event.name if exact else re.sub(r"[_.]?\d+", "", event.name)[:70]]
            entry[0] += event.duration_ns / 1e6
            entry[1] += 1
    longest = sorted(times.items(), key=lambda item: -item[1][0])
    return {
        "kernel_ms": round(sum(time for time, _ in times.values()), 1),
        "kernels": {name: [round(time, 2), count] for name, (time, count) in longest[: 400 if exact else 40]},
    }


def _kernels(profile: Any) -> Iterator[Any]:
    for plane in profile.planes:
        for line in plane.lines:
            if "GPU" in plane.name and line.name.startswith("Stream"):
                yield from line.events
            if plane.name == "/host:CPU" and line.name.startswith("tf_XLA"):
                for event in line.events:
                    # Neither the runtime's own, nor marks of an end, nor what contains other kernels.
                    if not re.match(r".*::|end: |(while|call|conditional)\b", event.name):
                        yield event
