"""The optimizer updates of one iteration: epochs of minibatches, each at its place in the run's schedule.

Invariant: what is trained when is a pure function of (seed, iteration), so that all ranks agree and a resumed run
goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa
from torch import Tensor, nn

from actors.config import OptimizerConfig
from actors.deepspeed_engine import TrainEngine
from actors.packed import Samples
from actors.pretraining import PretrainingMix, PretrainingPack
from actors.reports import TrainReport
from algorithms.config import OnlineConfig
from algorithms.schedules import learning_rate
from cluster.context import RankContext
from experience.packing import minibatches, plan_packs
from experience.schema import ROLLOUT, check_schema

P = TypeVar("P")


@dataclass(frozen=True)
class Size:
    """Response tokens and samples of a whole minibatch, over all ranks."""

    num_tokens: int
    num_samples: int


#: Maps a model, a micro-batch and the size of the whole minibatch to loss and metrics.
MinibatchLoss = Callable[[nn.Module, P, Size], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Minibatch:
    """One update: its rows of the iteration's batch, its learning rate, and what to call it in an error."""

    rows: list[int]
    learning_rate: float
    where: str


class ScheduledUpdates:
    """Cuts iterations into minibatches and gives each its learning rate."""

    def __init__(
        self,
        optimizer: OptimizerConfig,
        algorithm: OnlineConfig,
        seed: int,
        num_iterations: int,
        first_iteration: int = 0,
    ) -> None:
        """
        Args:
            num_iterations: of the whole run.
            first_iteration: the first that has updates; the schedule is of the updates from there on.
        """
        self._optimizer = optimizer
        self._num_epochs = algorithm.num_epochs
        self._num_minibatches = algorithm.num_minibatches
        self._seed = seed
        self._first_iteration = first_iteration
        self._num_updates = (num_iterations - first_iteration) * self.per_iteration

    @property
    def per_iteration(self) -> int:
        """Updates of one iteration."""
        return self._num_epochs * self._num_minibatches

    def of_iteration(self, iteration: int, num_rows: int) -> Iterator[Minibatch]:
        """The updates of ``iteration`` over a batch of ``num_rows`` samples, in order.

        Raises:
            ValueError: there are fewer rows than minibatches.
            AlgorithmError: the iteration has no updates.
        """
        update = (iteration - self._first_iteration) * self.per_iteration
        for epoch in range(self._num_epochs):
            cuts = minibatches(num_rows, self._num_minibatches, self._seed, iteration, epoch)
            for number, rows in enumerate(cuts):
                rate = scheduled_rate(self._optimizer, update, self._num_updates)
                yield Minibatch(rows, rate, f"iteration {iteration}, epoch {epoch}, minibatch {number}")
                update += 1


def scheduled_rate(optimizer: OptimizerConfig, update: int, num_updates: int) -> float:
    """Learning rate of an update of a run that has ``num_updates``."""
    schedule = optimizer.schedule
    return learning_rate(
        update,
        num_updates,
        optimizer.learning_rate,
        schedule.shape,
        schedule.warmup_fraction,
        schedule.final_fraction,
    )


def train_minibatches(
    engine: TrainEngine,
    updates: Iterator[Minibatch],
    samples: Samples,
    context: RankContext,
    max_tokens: int,
    make_pack: Callable[[Sequence[int]], P],
    loss: MinibatchLoss[P],
    pretraining: PretrainingMix | None = None,
) -> list[dict[str, float]]:
    """One update for each minibatch, and its metrics. Collective.

    Args:
        pretraining: text that is learnt in the same updates.

    Raises:
        TrainingDiverged: an update was refused.
        ValueError: a sample is longer than ``max_tokens``.
    """
    reports = []
    for number, minibatch in enumerate(updates):
        plan = plan_packs([samples.lengths[row] for row in minibatch.rows], context.num_ranks, max_tokens)
        packs = [make_pack([minibatch.rows[unit] for unit in units]) for units in plan.packs[context.rank]]
        num_tokens = max(1, sum(samples.response_lengths[row] for row in minibatch.rows))
        more = [] if pretraining is None else pretraining.packs(number)
        bound = partial(_of_minibatch, loss, Size(num_tokens, len(minibatch.rows)), pretraining)
        reports.append(engine.step([*packs, *more], bound, minibatch.learning_rate, minibatch.where))
    return reports


def _of_minibatch(
    loss: MinibatchLoss[P], size: Size, pretraining: PretrainingMix | None, model: nn.Module, pack: P | PretrainingPack
) -> tuple[Tensor, Mapping[str, Tensor]]:
    if isinstance(pack, PretrainingPack):
        assert pretraining is not None, "its packs come from it"
        return pretraining.loss(model, pack)
    return loss(model, pack, size)


def summarise(reports: Sequence[Mapping[str, float]], num_tokens: int, seconds: float) -> TrainReport:
    """Metrics averaged over an iteration's updates."""
    metrics = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
    metrics["tokens_per_second"] = num_tokens / seconds
    return TrainReport(metrics, num_tokens, seconds)


def all_ids(rollouts: Sequence[pa.RecordBatch]) -> pa.ChunkedArray:
    """The ``sample_id`` of all rows of several rollouts.

    Raises:
        SchemaError: one of them is no rollout.
    """
    for rollout in rollouts:
        check_schema(rollout, ROLLOUT)
    return pa.chunked_array([rollout.column("sample_id") for rollout in rollouts], pa.int64())
