"""`metrics.jsonl`: one JSON object for each measurement, on disk as soon as it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keras_gemma_ft.json_files import finite


class MetricsFile:
    """Appends records to a file of JSON lines.

    A run that was killed may have left a last line half-written; it is cut off. Steps that are run again
    after a resume appear twice: the later record counts.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        _cut_torn_line(path)
        self._lines = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
