"""Metrics stand in the files once, and a resumed run goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.metrics import MetricsWriter

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tensorboard",  # its protobuf stubs are of an older protobuf
)


def rows(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_and_events(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"policy/loss": 0.5})
        writer.write(2, {"policy/loss": 0.25})
    assert rows(tmp_path) == [{"step": 1, "policy/loss": 0.5}, {"step": 2, "policy/loss": 0.25}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("policy/loss")] == [(1, 0.5), (2, 0.25)]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    assert rows(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def test_resume_drops_what_will_be_written_again_and_a_cut_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"a": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "a"')
    with MetricsWriter(tmp_path, resume_after=2) as writer:
        writer.write(3, {"a": 30.0})
    assert rows(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 30.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
