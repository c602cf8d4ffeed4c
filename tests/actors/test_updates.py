"""The updates of an iteration: their place in the run's schedule, whichever iteration is the first."""

from __future__ import annotations

import pytest

from actors.config import OptimizerConfig, ScheduleConfig
from actors.updates import ScheduledUpdates
from algorithms.config import OnlineConfig
from algorithms.errors import AlgorithmError

#: Two epochs of two minibatches: four updates an iteration. Half of the updates warm up.
OPTIMIZER = OptimizerConfig(
    learning_rate=8.0, schedule=ScheduleConfig(shape="linear", warmup_fraction=0.5, final_fraction=0.0)
)
ALGORITHM = OnlineConfig(num_epochs=2, num_minibatches=2)


def rates(num_iterations: int, first_iteration: int) -> list[float]:
    updates = ScheduledUpdates(OPTIMIZER, ALGORITHM, 0, num_iterations, first_iteration)
    return [
        minibatch.learning_rate
        for iteration in range(first_iteration, num_iterations)
        for minibatch in updates.of_iteration(iteration, 6)
    ]


def test_the_schedule_is_of_the_updates_that_there_are() -> None:
    """Eight updates, rising over four to 8, and falling to 0 over four; so too behind three iterations with none."""
    assert rates(2, 0) == rates(5, 3) == [2, 4, 6, 8, 6, 4, 2, 0]


def test_a_resumed_run_is_at_its_place_and_what_is_in_a_minibatch_is_of_the_iteration() -> None:
    updates, from_the_first = (ScheduledUpdates(OPTIMIZER, ALGORITHM, 0, 5, first) for first in (3, 0))
    last = list(updates.of_iteration(4, 6))
    assert [minibatch.learning_rate for minibatch in last] == [6, 4, 2, 0]
    assert [minibatch.rows for minibatch in last] == [other.rows for other in from_the_first.of_iteration(4, 6)]
    assert last[0].where == "iteration 4, epoch 0, minibatch 0"


def test_before_the_first_iteration_there_are_no_updates() -> None:
    updates = ScheduledUpdates(OPTIMIZER, ALGORITHM, 0, 5, 3)
    with pytest.raises(AlgorithmError, match="update -4 is not one of a run of 8"):
        list(updates.of_iteration(2, 6))
