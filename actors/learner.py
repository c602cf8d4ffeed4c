"""The learner: the one trained role of pre-training, SFT and reward models.

Invariant: loss and gradient of an update are those of its whole batch, whatever the number of ranks and packs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import TrainedRoleConfig
from actors.deepspeed_engine import TrainEngine
from actors.models import load_tokenizer
from actors.objectives import SupervisedBatch, SupervisedPack, objective_for
from actors.reports import TrainReport
from actors.updates import scheduled_rate
from algorithms.config import SupervisedConfig
from cluster.context import RankContext
from experience.packing import plan_packs


class LearnerActor:
    """One rank of the learner."""

    def __init__(
        self, context: RankContext, config: TrainedRoleConfig, algorithm: SupervisedConfig, seed: int
    ) -> None:
        """Load the model and shard it over the ranks. Collective.

        Raises:
            ModelError: model or tokenizer cannot be loaded, or the model is of the wrong kind.
        """
        self._context = context
        self._config = config
        self._objective = objective_for(algorithm.name)
        self._tokenizer = load_tokenizer(config.model)
        self._engine = TrainEngine(self._objective.load(config.model, seed), context, config)

    def train(self, update: int, num_updates: int, batch: pa.RecordBatch) -> TrainReport:
        """Optimizer update number ``update`` of ``num_updates``, on ``batch``. Collective.

        Raises:
            SchemaError: the batch is not of the objective's schema.
            ValueError: a unit (a row, or a comparison) is longer than ``max_tokens_per_pack``.
            TrainingDiverged: loss or gradient is not finite; the update was not applied.
        """
        started = time.perf_counter()
        prepared = self._objective.batch([batch])

        def loss(model: nn.Module, pack: SupervisedPack) -> tuple[Tensor, Mapping[str, Tensor]]:
            return self._objective.loss(model, pack, prepared.denominator)

        rate = scheduled_rate(self._config.optimizer, update, num_updates)
        metrics = self._engine.step(self._packs(prepared), loss, rate, f"update {update}")
        num_tokens = sum(prepared.unit_lengths)
        seconds = time.perf_counter() - started
        return TrainReport(metrics | {"tokens_per_second": num_tokens / seconds}, num_tokens, seconds)

    def evaluate(self, batches: Sequence[pa.RecordBatch]) -> dict[str, float]:
        """Mean loss and metrics over a held-out set; nothing is learnt. Collective, same result on every rank.

        Raises:
            SchemaError: a batch is not of the objective's schema, or there is none.
        """
        prepared = self._objective.batch(batches)
        sums: list[dict[str, float]] = []

        def function(model: nn.Module, pack: SupervisedPack) -> Tensor:
            loss, metrics = self._objective.loss(model, pack, prepared.denominator)
            sums.append({name: float(value) for name, value in {"loss": loss, **metrics}.items()})
            return loss

        self._engine.forward(self._packs(prepared), function)
        means = {name: sum(part[name] for part in sums) for name in sums[0]}
        return self._objective.evaluation(self._engine.reduce_sums(means))

    def save(self, folder: Path) -> None:
        """Write everything that training goes on from. Collective."""
        self._engine.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote. Collective."""
        self._engine.load(folder)

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, tokenizer included. Collective."""
        self._engine.export(folder, self._tokenizer)

    def _packs(self, batch: SupervisedBatch) -> list[SupervisedPack]:
        plan = plan_packs(batch.unit_lengths, self._context.num_ranks, self._config.max_tokens_per_pack)
        device: torch.device = self._engine.device
        return [batch.pack(units, device) for units in plan.packs[self._context.rank]]
