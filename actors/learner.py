"""The learner: the one trained role of pre-training, SFT, reward models and preference optimisation.

Invariant: loss and gradient of an update are those of its whole batch, whatever the number of ranks and packs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import TrainedRoleConfig
from actors.deepspeed_engine import TrainEngine
from actors.errors import RoleError
from actors.feedback import Feedback
from actors.identity import DIGEST_BUCKET_BYTES, configuration_of, model_digest
from actors.models import load_tokenizer
from actors.normalisation import ScoreMap, score_map
from actors.objectives import LearningBatch, LossAndMetrics, NextToken, Objective
from actors.packed import EMPTY_ROW
from actors.preference import Preference
from actors.ranking import RewardRanking
from actors.reports import ColumnInfo, TrainReport
from actors.scoring import last_scores
from actors.sequences import ReferenceLogprobs, score_sequences
from actors.updates import scheduled_rate
from algorithms.config import FeedbackConfig, LearningConfig, PreferenceConfig, RewardModelConfig, SupervisedConfig
from cluster.context import RankContext
from experience.packing import plan_packs
from experience.schema import REF_FEEDBACK_LOGPROBS
from experience.tensors import list_column, pack


class LearnerActor:
    """One rank of the learner."""

    def __init__(
        self, context: RankContext, config: TrainedRoleConfig, algorithm: LearningConfig, seed: int
    ) -> None:
        """Load the model and shard it over the ranks. Collective.

        Raises:
            ModelError: model or tokenizer cannot be loaded, or the model is of the wrong kind.
        """
        self._context = context
        self._config = config
        self._objective = objective_for(algorithm)
        self._tokenizer = load_tokenizer(config.model)
        model = self._objective.load(config.model, seed)
        self._configuration = configuration_of(model)
        self._engine = TrainEngine(model, context, config)

    def train(self, update: int, num_updates: int, batch: pa.RecordBatch) -> TrainReport:
        """Optimizer update number ``update`` of ``num_updates``, on ``batch``. Collective.

        Raises:
            SchemaError: the batch is not of the objective's schema.
            ValueError: a unit (a row, or a comparison) is longer than ``max_tokens_per_pack``.
            TrainingDiverged: loss or gradient is not finite; the update was not applied.
        """
        started = time.perf_counter()
        prepared = self._objective.batch([batch])
        self._objective.survey(prepared, self._total)

        def loss(model: nn.Module, pack: Any) -> LossAndMetrics:
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
        self._objective.survey(prepared, self._total)
        sums: list[dict[str, float]] = []

        def function(model: nn.Module, pack: Any) -> Tensor:
            loss, metrics = self._objective.heldout_loss(model, pack, prepared.denominator)
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

    def measure_scores(self, batch: pa.RecordBatch, unit_std: bool) -> ScoreMap:
        """The map that gives the scores of the rows of ``batch`` mean 0, and with ``unit_std`` deviation 1.

        A row of any schema with ``tokens`` is scored at its last token. Collective; the same on every rank.

        Raises:
            RoleError: there is no row, or all have the same score.
            ValueError: a row is longer than ``max_tokens_per_pack``.
        """
        tokens = list_column(batch, "tokens")
        lengths = tokens.lengths.tolist()
        plan = plan_packs(lengths, self._context.num_ranks, self._config.max_tokens_per_pack)
        mine = plan.packs[self._context.rank] if lengths else ()
        packs = [(pack(tokens, units) if units else EMPTY_ROW).to(self._engine.device) for units in mine]
        scores = self._engine.forward(packs, last_scores)
        own = [score[: len(units)].cpu().double() for score, units in zip(scores, mine, strict=True)]
        flat = torch.cat([torch.zeros(0, dtype=torch.float64), *own])
        sums = self._engine.reduce_sums({"count": float(len(flat)), "total": float(flat.sum())})
        mean = sums["total"] / max(1.0, sums["count"])
        squares = self._engine.reduce_sums({"squares": float((flat - mean).square().sum())})
        return score_map(**sums, **squares, unit_std=unit_std)

    def export(self, folder: Path, mapped: ScoreMap | None = None) -> None:
        """Write the model as a Hugging Face folder, tokenizer included; a scorer's scores mapped. Collective."""
        self._engine.export(folder, self._tokenizer, mapped)

    def model_digest(self) -> str:
        """A digest of the model, with an adapter of the base alone; the same on every rank. Collective."""
        return model_digest(self._configuration, self._engine.weights(DIGEST_BUCKET_BYTES, ("base",)))

    def score_reference(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, ColumnInfo]:
        """The starting model's log-probs of whole responses: the reference's column of this rank's rows.

        With an adapter it is the base with the adapter off. Collective where weights are sharded.

        Raises:
            RoleError: the model is tuned in full and has been trained, so what it started from is gone.
            SchemaError: the batch is not of the objective's schema.
            ValueError: a row is longer than ``max_tokens_per_pack``.
        """
        adapted = self._config.tuning.has_adapter
        if self._engine.num_updates and not adapted:
            raise RoleError(f"{self._context.role}: the model has been trained; its start cannot be scored any more")
        self._objective.batch([batch])  # refused here and not at the first update
        with self._engine.adapter_off() if adapted else nullcontext():
            return score_sequences(
                self._engine,
                batch,
                context=self._context,
                device=self._engine.device,
                collective=self._config.zero.stage == 3,
                max_tokens=self._config.max_tokens_per_pack,
            )

    def use_reference(self, path: Path) -> None:
        """Compare with the reference's log-probs in a file of its columns, from sequence 0 on.

        Raises:
            RoleError: the file cannot be read, or what is learnt compares with no reference.
            SchemaError: the file is of another schema.
        """
        match self._objective:
            case Preference():
                self._objective.use_reference(ReferenceLogprobs(path))
            case Feedback():
                self._objective.use_reference(ReferenceLogprobs(path, REF_FEEDBACK_LOGPROBS))
            case _:
                raise RoleError(f"{self._context.role}: what it learns compares with no reference")

    def export_adapter(self, folder: Path) -> None:
        """Write the adapter alone. Collective.

        Raises:
            RoleError: the model is tuned in full.
        """
        self._engine.export_adapter(folder)

    def _total(self, batch: LearningBatch[Any], function: Callable[[nn.Module, Any], Tensor]) -> float:
        parts = [float(part) for part in self._engine.forward(self._packs(batch), function)]
        return self._engine.reduce_sums({"total": sum(parts)})["total"]

    def _packs(self, batch: LearningBatch[Any]) -> list[Any]:
        plan = plan_packs(batch.unit_lengths, self._context.num_ranks, self._config.max_tokens_per_pack)
        device: torch.device = self._engine.device
        return [batch.pack(units, device) for units in plan.packs[self._context.rank]]


def objective_for(algorithm: LearningConfig) -> Objective[Any]:
    """What ``algorithm`` learns.

    Raises:
        RoleError: it is not one of those that learn from a data set.
    """
    match algorithm:
        case SupervisedConfig():
            return NextToken()
        case RewardModelConfig():
            return RewardRanking(algorithm)
        case PreferenceConfig():
            return Preference(algorithm)
        case FeedbackConfig():
            return Feedback(algorithm)
        case _:
            raise RoleError(f"{type(algorithm).__name__} is no way to learn from a data set")
