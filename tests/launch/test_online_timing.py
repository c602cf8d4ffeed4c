"""When the online driver has things computed, over stand-ins for the roles: during warm-up, and ahead of training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from actors.reports import ColumnInfo, TrainReport
from algorithms.kl import KLController
from experience.schema import POLICY_LOGPROBS, VALUES, make_batch
from tests.launch.test_online_driver import Group, Policy, Run, nothing_travels

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


class Recomputing(Policy):
    """Its log-probs fall by one with each iteration trained; keeps those to divide by, and numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: list[int] = []
        self.behaviour: list[set[float]] = []

    def score(self, rollouts: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        rows = [row for batch in rollouts for row in batch.to_pylist()]
        self.scored.append(len(rows))
        ids, version = [row["sample_id"] for row in rows], len(self.prompts)
        logprobs = [[-1.0 - version] * len(row["rollout_logprobs"]) for row in rows]
        return make_batch(POLICY_LOGPROBS, {"sample_id": ids, "policy_logprobs": logprobs}), ColumnInfo(len(rows), 0, 0)

    def train(self, iteration: int, rollouts: list[pa.RecordBatch], credit: list[pa.RecordBatch], *rest: Any) -> Any:
        rows = [row for batch in credit for row in batch.column("behaviour_logprobs").to_pylist()]
        self.behaviour.append({number for row in rows for number in row})
        return super().train(iteration, rollouts, credit, *rest)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
async def test_recomputed_logprobs_are_of_the_weights_that_training_starts_from(
    max_staleness: int, tmp_path: Path
) -> None:
    """Of all tokens of a batch, also of those that stood ready, or were being drawn, while others were trained on."""
    correction = "algorithm.correction.method=decoupled"
    run = Run(tmp_path, "dr_grpo", lambda prompt: False, correction, max_staleness=max_staleness)
    policy = run.policy = Recomputing()
    run.roles = replace(run.roles, policy=cast(Any, Group(policy)))
    await run.drive()
    assert max(row["experience/staleness_max"] for row in run.recorder.rows) == max_staleness
    assert policy.behaviour == [{-1.0}, {-2.0}, {-3.0}]
    # All of a batch at a time where generation is ahead, slice by slice where it is not.
    assert sum(policy.scored) == 24
    assert (policy.scored == [8, 8, 8]) == (max_staleness > 0)
    # k is exp(-1 - version) over the exp(-1) that the engine says.
    weights = [row["experience/correction_weight"] for row in run.recorder.rows]
    assert weights == pytest.approx([math.exp(-version) for version in range(3)])
