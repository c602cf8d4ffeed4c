"""What failed or was dropped while an iteration was generated is told with it, also after a stop in between."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from actors.source import SourceActor
from launch.online_state import OnlineState
from tests.launch.test_online_driver import TWO_REWARDS, Group, Run, Source, TextReward, nothing_travels

__all__ = ["nothing_travels"]

FAILING = (1, 5, 6, 9, 13)


class StoringSource(Source):
    """Keeps columns as the role does."""

    keep = SourceActor.keep
    kept = SourceActor.kept


def started(tmp_path: Path) -> Run:
    even = TextReward(lambda prompt: prompt in FAILING)
    run = Run(tmp_path, "dr_grpo", lambda prompt: False, *TWO_REWARDS, rewards={"even": even}, max_staleness=1)
    run.roles = replace(run.roles, source=cast(Any, Group(StoringSource())))
    return run


def told(*runs: Run) -> Counter[str]:
    """All that was counted, over the iterations of runs that go on from each other."""
    rows = [row for run in runs for row in run.recorder.rows]
    names = ("reward/even/failed", "reward/even/failed_raised", "reward/even/retried", "dropped/reward_raised")
    return sum((Counter({name: int(row.get(name, 0)) for name in names}) for row in rows), Counter())


async def test_counts_of_buffered_iterations_are_told_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation is an iteration ahead when the run is stopped: that iteration's failures are in the checkpoint."""
    whole = started(tmp_path / "whole")
    await whole.drive()
    assert told(whole)["reward/even/failed"] == told(whole)["dropped/reward_raised"] == len(FAILING)

    run = started(tmp_path / "parts")
    train = run.policy.train

    def train_and_stop(*args: Any) -> Any:
        run.stop.signal = signal.SIGTERM
        return train(*args)

    monkeypatch.setattr(run.policy, "train", train_and_stop)
    await run.drive()
    again = started(tmp_path / "parts")
    again.state = OnlineState.read(again.config, again.store, again.store.latest())
    assert again.state.iteration == 1 and again.state.buffered is not None
    assert again.state.counts.keys() == {1}
    kept = dict(again.state.counts[1])
    assert kept["reward/even/failed"] > 0
    await again.drive()
    assert {name: again.recorder.rows[0][name] for name in kept} == kept
    assert told(run, again) == told(whole)
    assert again.state.ledger.balance().dropped == {"reward raised": len(FAILING)}


async def test_counts_of_an_iteration_in_part_are_kept(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.state.counts[0]["reward/even/failed"] += 1
    run.state.iteration = 1
    run.state.counts[1] += Counter({"reward/even/failed": 2, "dropped/reward_raised": 1})
    empty: Any = {"version": 1, "batch_rows": 8, "chunks": []}
    await run.state.save(run.roles, empty, [])
    again = OnlineState.read(run.config, run.store, run.store.latest())
    assert again.counts == {1: Counter({"reward/even/failed": 2, "dropped/reward_raised": 1})}
    again.counts[2]["reward/even/failed"] += 1  # further iterations begin with none
