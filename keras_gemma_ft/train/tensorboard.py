"""Scalars for TensorBoard, written with its own record format; needs no TensorFlow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from keras_gemma_ft.best_metric import NAMES

TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    **{f"eval_{name}": f"held_out/{name}" for name in NAMES},
}


class TensorBoardScalars:
    """Writes the numbers of each record as scalars by step.

    Args:
        directory: For `tensorboard --logdir`; created.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        # The name that TensorBoard looks for; nanoseconds, so that a resumed run has a file of its own.
        self._file = (directory / f"events.out.tfevents.{time.time_ns()}").open("wb")
        self._records = RecordWriter(self._file)
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, record: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag, simple_value=record[name]) for name, tag in TAGS.items() if name in record
        ]
        if values:
            self._put(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()
