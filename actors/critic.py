"""The critic: a model with one output a token, that learns to foretell the return.

Invariant: the value of response token t is predicted from the prefix *before* t, the position that the policy
draws t from; so it never sees what it is the baseline of.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import CriticConfig
from actors.deepspeed_engine import TrainEngine
from actors.identity import DIGEST_BUCKET_BYTES, configuration_of, model_digest
from actors.models import load_scorer
from actors.packed import ResponsePack, Samples
from actors.reports import ColumnInfo, TrainReport
from actors.scoring import score_responses
from actors.updates import ScheduledUpdates, Size, all_ids, summarise, train_minibatches
from algorithms.config import OnlineConfig
from algorithms.losses import clipped_value_loss
from cluster.context import RankContext
from experience.schema import CREDIT_WITH_RETURNS, VALUES, check_schema, require_same_rows
from experience.tensors import list_column


@dataclass(frozen=True)
class _CriticPack:
    """A micro-batch with the values at rollout time and the returns, each (S,)."""

    samples: ResponsePack
    rollout_values_S: Tensor
    returns_S: Tensor


class CriticActor:
    """One rank of the critic."""

    def __init__(
        self, context: RankContext, config: CriticConfig, algorithm: OnlineConfig, seed: int, num_iterations: int
    ) -> None:
        """Load the model and shard it over the ranks. Collective.

        Raises:
            ModelError: the model cannot be loaded, or has not one label.
        """
        self._context = context
        self._config = config
        self._algorithm = algorithm
        self._updates = ScheduledUpdates(config.optimizer, algorithm, seed, num_iterations)
        model = load_scorer(config.model, seed=seed)
        self._configuration = configuration_of(model)
        self._engine = TrainEngine(model, context, config)

    def score(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Values of the prefixes before each response token: VALUES of this rank's rows."""
        return score_responses(
            self._engine,
            _values,
            rollouts,
            context=self._context,
            device=self._engine.device,
            collective=self._config.zero.stage == 3,
            max_tokens=self._config.max_tokens_per_pack,
            schema=VALUES,
        )

    def train(
        self,
        iteration: int,
        rollouts: Sequence[pa.RecordBatch],
        values: Sequence[pa.RecordBatch],
        credit: Sequence[pa.RecordBatch],
    ) -> TrainReport:
        """All epochs and minibatches of one iteration. Collective; same arguments, and same report, on every rank.

        Args:
            values: what ``score`` gave for the same rows, in their order.

        Raises:
            SchemaError: values or credit are not of the rollouts' rows.
            TrainingDiverged: loss or gradient of an update is not finite; that update was not applied.
        """
        started = time.perf_counter()
        ids = all_ids(rollouts)
        for columns, schema in ((values, VALUES), (credit, CREDIT_WITH_RETURNS)):
            for batch in columns:
                check_schema(batch, schema)
            require_same_rows(ids, pa.Table.from_batches(list(columns)))
        samples = Samples(rollouts)
        rollout_values, returns = list_column(values, "values"), list_column(credit, "returns")
        device = self._engine.device

        def make_pack(rows: Sequence[int]) -> _CriticPack:
            return _CriticPack(
                samples.pack(rows, device), rollout_values.gather(rows).to(device), returns.gather(rows).to(device)
            )

        reports = train_minibatches(
            self._engine,
            self._updates.of_iteration(iteration, samples.num_rows),
            samples,
            self._context,
            self._config.max_tokens_per_pack,
            make_pack,
            self._loss,
        )
        num_tokens = sum(samples.lengths) * self._algorithm.num_epochs
        return summarise(reports, num_tokens, time.perf_counter() - started)

    def model_digest(self) -> str:
        """A digest of the model, with an adapter of the base and the head; the same on every rank. Collective."""
        return model_digest(self._configuration, self._engine.weights(DIGEST_BUCKET_BYTES, ("base",)))

    def save(self, folder: Path) -> None:
        """Write everything that training goes on from. Collective."""
        self._engine.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote. Collective."""
        self._engine.load(folder)

    def _loss(self, model: nn.Module, pack: _CriticPack, size: Size) -> tuple[Tensor, Mapping[str, Tensor]]:
        return clipped_value_loss(
            _values(model, pack.samples),
            pack.rollout_values_S,
            pack.returns_S,
            clip_value=self._algorithm.clip_value,
            denominator=size.num_tokens,
        )


def _values(model: nn.Module, pack: ResponsePack) -> Tensor:
    return torch.as_tensor(model(pack.packed.tokens, pack.packed.position_ids, pack.positions_S))
