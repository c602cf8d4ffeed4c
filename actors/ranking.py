"""Reward models: one score for a response, learnt from people's order of several.

Legend: N responses and P prompts of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.comparisons import ComparisonPack, Comparisons
from actors.config import ModelConfig
from actors.models import PackedModel, load_scorer
from actors.objectives import LearningBatch, LossAndMetrics, Objective
from algorithms.calibration import ReliabilityBin, calibration_counts, expected_calibration_error, reliability
from algorithms.config import RewardModelConfig
from algorithms.loss_terms import add_terms
from algorithms.ranking import (
    accuracy_counts,
    best_of_loss,
    centring_term,
    kwise_centring_term,
    kwise_loss,
    num_ranked_prompts,
    ranked_pairs,
    ranks_of_preferences,
    soft_pairwise_loss,
)
from experience.schema import SchemaError

#: Bins of confidence in an evaluation.
NUM_BINS = 10
_BIN = "calibration_{}_{}"
_RATING = "rating_{}_{}"
_PARTS = ("count", "confidence", "correct")


class RankedBatch(LearningBatch[ComparisonPack]):
    """Each comparison is a unit: all its responses go into one pack."""

    def __init__(self, rows: Sequence[pa.RecordBatch], loss: str) -> None:
        self.comparisons = Comparisons(rows)
        self.unit_lengths = self.comparisons.unit_lengths
        bounds = torch.tensor(self.comparisons.bounds)
        ranked = num_ranked_prompts(self.comparisons.ranks, bounds)
        # A soft label is of two responses and needs no ranks.
        self.denominator = self.comparisons.num_comparisons if loss == "soft_labels" else ranked
        if not self.denominator:
            raise SchemaError("comparisons: no comparison of the batch has two responses of different rank")
        if loss == "soft_labels" and max(self.comparisons.sizes) > 2:
            raise SchemaError("comparisons: a soft label is of two responses; use `loss: ranking` for more")

    def pack(self, units: Sequence[int], device: torch.device) -> ComparisonPack:
        """Comparisons laid end to end."""
        return self.comparisons.pack(units, device)


class RewardRanking(Objective[ComparisonPack]):
    """Scores, read at each response's last token, ranked as people ranked the responses."""

    def __init__(self, config: RewardModelConfig) -> None:
        self._config = config
        self._rating_names: tuple[str, ...] = ()

    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """A model with one output a token; a causal language model gets a head that is all zeros."""
        return load_scorer(config, seed=seed)

    def batch(self, rows: Sequence[pa.RecordBatch]) -> LearningBatch[ComparisonPack]:
        """Each comparison is a unit."""
        batch = RankedBatch(rows, self._config.loss)
        self._rating_names = batch.comparisons.rating_names
        return batch

    def loss(self, model: nn.Module, pack: ComparisonPack, denominator: int) -> LossAndMetrics:
        """The configured loss, with the centring term where it has a weight."""
        return self._loss(_scores(model, pack), pack, denominator)

    def heldout_loss(self, model: nn.Module, pack: ComparisonPack, denominator: int) -> LossAndMetrics:
        """Adds how sure and how right the scores are, by confidence and by rating."""
        scores_N = _scores(model, pack)
        loss, metrics = self._loss(scores_N, pack, denominator)
        counts, ranks_N = self._calibration(scores_N, pack), pack.ranks_N
        if self._config.loss == "soft_labels":
            ranks_N = ranks_of_preferences(pack.preferences_P)
        ratings = accuracy_counts(scores_N, ranks_N, pack.offsets_P, pack.ratings_P, max(1, len(self._rating_names)))
        more = {_BIN.format(row, part): counts[row, at] for row in range(NUM_BINS) for at, part in enumerate(_PARTS)}
        for row, name in enumerate(self._rating_names):
            if name:
                more[_RATING.format(name, "count")], more[_RATING.format(name, "correct")] = ratings[row]
        return loss, {**metrics, **more}

    def evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Adds ``calibration_error`` (expected, over ten bins) and ``accuracy_<rating>``, without the margin."""
        table = [[sums[_BIN.format(row, part)] for part in _PARTS] for row in range(NUM_BINS)]
        report = {name: value for name, value in sums.items() if not name.startswith("rating_")}
        report["calibration_error"] = expected_calibration_error(torch.tensor(table, dtype=torch.float64))
        for name in self._rating_names:
            if name and sums[_RATING.format(name, "count")]:
                correct, count = sums[_RATING.format(name, "correct")], sums[_RATING.format(name, "count")]
                report[f"accuracy_{name}"] = correct / count
        return report

    def _calibration(self, scores_N: Tensor, pack: ComparisonPack) -> Tensor:
        """How sure and how right the scores are, by bins of confidence."""
        if self._config.loss == "soft_labels":
            # The first is right with the stated probability, the second with the rest: scores that fit the
            # probabilities are calibrated, whichever response the row has first.
            margins_P, preferences_P = scores_N[0::2] - scores_N[1::2], pack.preferences_P
            return calibration_counts(
                torch.cat([margins_P, -margins_P]), NUM_BINS, torch.cat([preferences_P, 1 - preferences_P])
            )
        pairs = ranked_pairs(pack.ranks_N, pack.offsets_P)
        return calibration_counts(scores_N[pairs.better_M] - scores_N[pairs.worse_M], NUM_BINS, pairs.weights_M)

    def _loss(self, scores_N: Tensor, pack: ComparisonPack, denominator: int) -> LossAndMetrics:
        match self._config.loss:
            case "ranking":
                loss = kwise_loss(
                    scores_N, pack.ranks_N, pack.offsets_P, margins_P=pack.margins_P, denominator=denominator
                )
            case "soft_labels":
                loss = soft_pairwise_loss(
                    scores_N[0::2], scores_N[1::2], pack.preferences_P, denominator=denominator
                )
            case "best_of":
                loss = best_of_loss(scores_N, pack.ranks_N, pack.offsets_P, denominator=denominator)
        coefficient = self._config.centring_coefficient
        if not coefficient:
            return loss
        if self._config.loss == "soft_labels":  # of every comparison: ties are learnt from too
            firsts, seconds = scores_N[0::2], scores_N[1::2]
            return add_terms(loss, centring_term(firsts, seconds, coefficient=coefficient, denominator=denominator))
        return add_terms(
            loss,
            kwise_centring_term(
                scores_N, pack.ranks_N, pack.offsets_P, coefficient=coefficient, denominator=denominator
            ),
        )


def reliability_of(report: Mapping[str, float]) -> list[ReliabilityBin]:
    """The reliability table in what ``RewardRanking.evaluation`` reported; empty in a report of another kind."""
    if _BIN.format(0, _PARTS[0]) not in report:
        return []
    table = [[report[_BIN.format(row, part)] for part in _PARTS] for row in range(NUM_BINS)]
    return reliability(torch.tensor(table, dtype=torch.float64))


def without_counts(report: Mapping[str, float]) -> dict[str, float]:
    """A report without the counts that ``reliability_of`` reads."""
    return {name: value for name, value in report.items() if not name.startswith("calibration_") or "error" in name}


def _scores(model: nn.Module, pack: ComparisonPack) -> Tensor:
    last_N = (pack.packed_offsets[1:] - 1).to(pack.packed.tokens.device)
    return torch.as_tensor(model(pack.packed.tokens, pack.packed.position_ids, last_N))
