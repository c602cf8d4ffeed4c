"""The supervised driver without its roles: stand-ins keep what they were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.learner import LearnerActor
from actors.reports import TrainReport
from actors.source import BatchInfo, SourceActor
from data.order import Cursor, advance
from launch import supervised
from launch.checkpoint import CheckpointStore
from launch.config import LearnerRunConfig
from launch.configfile import load
from launch.recorder import Recorder
from launch.roles import SupervisedRoles
from launch.stopping import StopRequest
from launch.supervised import SupervisedDriver
from launch.supervised_state import SupervisedProgress, SupervisedState
from tests.launch.test_resume import described

SFT = Path(__file__).parents[2] / "examples" / "sft.yaml"


class Roles:
    """A source with so many held-out rows, and a learner that is evaluated on what it gives."""

    def __init__(self, num_heldout_rows: int) -> None:
        self.num_heldout_rows = num_heldout_rows
        self.evaluated: list[Sequence[Any]] = []

    async def column_of(self, rank: int, method: object, start: int, num_rows: int) -> tuple[Any, Any]:
        assert (rank, method) == (0, SourceActor.heldout)
        return range(start, min(start + num_rows, self.num_heldout_rows)), None

    async def call(self, method: object, batches: Sequence[Any]) -> list[dict[str, float]]:
        assert method is LearnerActor.evaluate
        self.evaluated.append(batches)
        return [{"loss": 1.5}]


async def evaluations_of(num_heldout_rows: int, longest_row: int, folder: Path) -> list[list[list[int]]]:
    """The rows of each batch of each evaluation, of a run that stops at once."""
    config = load(SFT)
    assert isinstance(config, LearnerRunConfig)
    roles, told = Roles(num_heldout_rows), list[dict[str, float]]()
    recorder = SimpleNamespace(evaluation=lambda step, metrics: told.append(metrics))
    state = SupervisedState(config, CheckpointStore(folder, keep=1), SupervisedProgress(0, "{}", "f"), 0)
    data = replace(described("f"), num_heldout_rows=num_heldout_rows, longest_row=longest_row)
    both = cast(SupervisedRoles, SimpleNamespace(source=roles, learner=roles))
    driver = SupervisedDriver(config, both, data, state, cast(Recorder, recorder), StopRequest(), folder)
    await driver.run()
    assert len(told) == len(roles.evaluated)
    return [[list(batch) for batch in batches] for batches in roles.evaluated]


async def test_held_out_rows_come_in_batches_that_are_not_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once and in order, whatever the largest is."""
    monkeypatch.setattr(supervised, "HELDOUT_TOKENS", 100)
    assert await evaluations_of(7, 30, tmp_path) == [[[0, 1, 2], [3, 4, 5], [6]]]
    assert await evaluations_of(3, 33, tmp_path) == [[[0, 1, 2]]]
    assert await evaluations_of(2, 900, tmp_path) == [[[0], [1]]]
    assert await evaluations_of(0, 900, tmp_path) == []


class Learning:
    """A source of ``num_rows`` rows that come in file order, and a learner that keeps the batches it is given."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.batches: list[list[int]] = []

    async def column_of(self, rank: int, method: object, cursor: str, num_rows: int) -> tuple[list[int], BatchInfo]:
        assert (rank, method) == (0, SourceActor.next_batch)
        at = Cursor.from_json(cursor)
        rows = [(at.position + row) % self.num_rows for row in range(num_rows)]
        following = advance(at, num_rows, self.num_rows).to_json()
        return rows, BatchInfo(num_rows, num_rows, tuple(rows), (1,) * num_rows, following)

    async def call(self, method: object, *args: Any) -> list[TrainReport]:
        if method is LearnerActor.train:
            self.batches.append(args[2])
        return [TrainReport({}, 1, 1.0)]


@pytest.mark.parametrize("stopped_after", [None, 1, 3])
@pytest.mark.parametrize(
    ("override", "sizes"),
    [
        ("algorithm.num_epochs=2", [4, 4, 4, 2]),
        ("algorithm.num_epochs=1.5", [4, 4, 2]),
        ("algorithm.batch_size=9", [9, 5]),
        ("algorithm.batch_size=2", [2] * 7),
        ("run.num_iterations=2", [4, 4]),
    ],
)
async def test_every_row_is_learnt_once_an_epoch(
    override: str, sizes: list[int], stopped_after: int | None, tmp_path: Path
) -> None:
    """The last batch is what is left of the epochs; so where the run was stopped and went on."""
    config = load(SFT, ["algorithm.num_epochs=2", "algorithm.batch_size=4", "run.checkpoint_every=1", override])
    assert isinstance(config, LearnerRunConfig)
    roles, num_rows = Learning(7), 7
    both = cast(SupervisedRoles, SimpleNamespace(source=roles, learner=roles))
    data, progress = replace(described("f"), num_rows=num_rows), SupervisedProgress(0, "{}", "f")
    recorder = cast(Recorder, SimpleNamespace(training=lambda *args: None))
    for last in (stopped_after or 99, 99):
        num_updates = min(last, SupervisedState.planned_updates(config, num_rows, progress))
        state = SupervisedState(config, CheckpointStore(tmp_path, keep=1), progress, num_updates)
        await SupervisedDriver(config, both, data, state, recorder, StopRequest(), tmp_path).run()
    assert [len(batch) for batch in roles.batches] == sizes
    assert [row for batch in roles.batches for row in batch] == [row % 7 for row in range(sum(sizes))]
