"""When the online driver has things computed, over stand-ins for the roles: during warm-up, and ahead of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from actors.reports import ColumnInfo, TrainReport
from algorithms.kl import KLController
from experience.schema import VALUES, make_batch
from tests.launch.test_online_driver import Group, Run, nothing_travels

__all__ = ["nothing_travels"]

#: The policy's stand-in is the reference; the log-probs that it gives as that fall by one with each iteration trained.
MOVING = ("policy.ema_decay=0.9", "policy.ema_is_reference=true", "algorithm.kl.coefficient=0.1")


class Critic:
    """Knows nothing, and counts how often it is trained."""

    def __init__(self) -> None:
        self.num_trained = 0

    def score(self, rollouts: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        rows = [row for batch in rollouts for row in batch.to_pylist()]
        columns = {"sample_id": [row["sample_id"] for row in rows], "values": [[0.0, 0.0]] * len(rows)}
        return make_batch(VALUES, columns), ColumnInfo(len(rows), 0, 0.0)

    def train(self, *_: Any) -> TrainReport:
        self.num_trained += 1
        return TrainReport({}, 1, 1.0)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)


async def test_while_the_critic_warms_up_the_kl_coefficient_is_not_steered(tmp_path: Path) -> None:
    """Target 1 nat, 8 samples a batch, horizon 80: a factor of 0.98 for a KL of 0, and of 1.02 for one of 2."""
    critic = "critic={model: {path: x}, optimizer: {learning_rate: 1.0e-5}}"
    run = Run(tmp_path, "ppo", lambda prompt: False, *MOVING, critic, "algorithm.critic_warmup_iterations=1")
    stand_in = Critic()
    run.roles = replace(run.roles, critic=cast(Any, Group(stand_in)))
    run.state.kl = KLController(0.1, 1.0, 80)
    await run.drive()
    assert stand_in.num_trained == 3 and len(run.policy.prompts) == 2
    assert [row["experience/kl_per_sample"] for row in run.recorder.rows] == [0, 0, 2]
    assert [row["kl_coefficient"] for row in run.recorder.rows] == pytest.approx([0.1, 0.1, 0.098])
    assert run.state.kl.coefficient == pytest.approx(0.098 * 1.02)
