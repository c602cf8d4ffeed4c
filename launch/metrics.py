"""A run's metrics, as JSON lines and as TensorBoard events.

Invariants:

- A step stands in the files once. A resumed run drops what was written after the step it goes on from, since it is
  going to write these steps again.
- A value that is not finite is written as null, which JSON has a word for; TensorBoard gets it as it is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from launch.rundir import METRICS_FILE

EVENTS_FOLDER = "tensorboard"


class MetricsWriter:
    """Writes rows of metrics; use it as a context manager.

    Args:
        folder: the run's.
        resume_after: the last step that stays.
    """

    def __init__(self, folder: Path, *, resume_after: int = 0) -> None:
        self._path = folder / METRICS_FILE
        if self._path.exists():
            _keep_until(self._path, resume_after)
        self._file = self._path.open("a")
        self._events = EventFileWriter(str(folder / EVENTS_FOLDER))
        if resume_after:  # TensorBoard forgets what earlier event files say of these steps
            log = SessionLog(status=SessionLog.SessionStatus.START)
            self._events.add_event(Event(step=resume_after + 1, session_log=log))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: metrics by name, at ``step`` iterations (or updates)."""
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._events.add_event(Event(step=step, summary=summary))


def _keep_until(path: Path, step: int) -> None:
    """Drop rows after ``step``, and a last row that was cut short."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    beside = path.with_suffix(".part")
    beside.write_text("".join(kept))
    os.replace(beside, path)
