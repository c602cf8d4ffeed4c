"""What a supervised run learns: how rows become units and micro-batches, and a micro-batch a loss.

Legend: T tokens of a pack, S learnt tokens of a pack, C comparisons of a pack.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import ModelConfig
from actors.models import PackedModel, load_causal_lm, load_scorer
from actors.packed import EMPTY_ROW
from algorithms.logprobs import token_logprobs
from algorithms.losses import next_token_loss
from algorithms.ranking import pairwise_loss
from experience.schema import COMPARISONS, EXAMPLES, SchemaError, check_schema
from experience.tensors import Batches, PackedRows, list_column, pack, scalar_column


@dataclass(frozen=True)
class SupervisedPack:
    """Units laid end to end. ``positions`` are what the loss reads, ``targets_S`` what next tokens are to be."""

    packed: PackedRows
    positions: Tensor
    targets_S: Tensor


class SupervisedBatch(ABC):
    """A batch cut into units, which a pack never splits."""

    unit_lengths: list[int]
    #: Learnt tokens, or comparisons, of all units.
    denominator: int

    @abstractmethod
    def pack(self, units: Sequence[int], device: torch.device) -> SupervisedPack:
        """Units laid end to end on ``device``; no units give a pack that adds nothing to loss or gradient."""


class Objective(ABC):
    """One way to learn from a data set."""

    @abstractmethod
    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """The model that this objective trains."""

    @abstractmethod
    def batch(self, rows: Sequence[pa.RecordBatch]) -> SupervisedBatch:
        """Units of a batch of the objective's schema.

        Raises:
            SchemaError: it is not of that schema, or holds nothing to learn.
        """

    @abstractmethod
    def loss(self, model: nn.Module, pack: SupervisedPack, denominator: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss and metrics of a micro-batch, divided by the denominator of all micro-batches together."""

    def evaluation(self, means: Mapping[str, float]) -> dict[str, float]:
        """What to report of a held-out set whose metrics have these means."""
        return dict(means)


class NextToken(Objective):
    """Cross-entropy of the tokens whose ``loss_mask`` is 1: pre-training and SFT."""

    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """A causal language model."""
        return load_causal_lm(config, seed=seed)

    def batch(self, rows: Sequence[pa.RecordBatch]) -> SupervisedBatch:
        """Each row is a unit."""
        return _Examples(rows)

    def loss(self, model: nn.Module, pack: SupervisedPack, denominator: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean nats a learnt token."""
        logits_SV = model(pack.packed.tokens, pack.packed.position_ids, pack.positions)
        logprobs_S = token_logprobs(logits_SV, pack.targets_S)
        return next_token_loss(logprobs_S, torch.ones_like(logprobs_S), denominator)

    def evaluation(self, means: Mapping[str, float]) -> dict[str, float]:
        """Adds ``perplexity``, e to the mean nats a token."""
        loss = means["loss"]
        return {**means, "perplexity": math.exp(loss) if loss < 700 else math.inf}


class Pairwise(Objective):
    """Bradley-Terry ranking loss over comparisons of two responses: reward models."""

    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """A model with one output a token; a causal language model gets a head that is all zeros."""
        return load_scorer(config, seed=seed)

    def batch(self, rows: Sequence[pa.RecordBatch]) -> SupervisedBatch:
        """Each comparison is a unit: both its responses go into one pack."""
        return _Comparisons(rows)

    def loss(self, model: nn.Module, pack: SupervisedPack, denominator: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-log sigmoid(chosen - rejected), scores read at each sequence's last token."""
        scores = model(pack.packed.tokens, pack.packed.position_ids, pack.positions)
        return pairwise_loss(scores[0::2], scores[1::2], denominator=denominator)


def objective_for(name: str) -> Objective:
    """The objective of ``SupervisedConfig.name``."""
    return Pairwise() if name == "reward_model" else NextToken()


class _Examples(SupervisedBatch):
    def __init__(self, rows: Batches) -> None:
        for batch in _listed(rows):
            check_schema(batch, EXAMPLES)
        self._tokens, self._mask = list_column(rows, "tokens"), list_column(rows, "loss_mask")
        if not torch.equal(self._tokens.offsets, self._mask.offsets):
            raise SchemaError("examples: tokens and loss_mask of a row differ in length")
        self.unit_lengths = self._tokens.lengths.tolist()
        everything = range(self._tokens.num_rows)
        self.denominator = len(self._learnt(pack(self._tokens, everything), everything))
        if self.denominator == 0:
            raise SchemaError(f"examples: none of the {self._tokens.num_rows} rows of a batch has a token to learn")

    def pack(self, units: Sequence[int], device: torch.device) -> SupervisedPack:
        if not units:
            return _nothing(device)
        packed = pack(self._tokens, units)
        learnt = self._learnt(packed, units)
        return SupervisedPack(packed.to(device), (learnt - 1).to(device), packed.tokens[learnt].to(device))

    def _learnt(self, packed: PackedRows, units: Sequence[int]) -> Tensor:
        """Where the learnt tokens stand. A row's first token has nothing to be predicted from."""
        return ((self._mask.gather(units) > 0) & (packed.position_ids > 0)).nonzero()[:, 0]


class _Comparisons(SupervisedBatch):
    def __init__(self, rows: Batches) -> None:
        for batch in _listed(rows):
            check_schema(batch, COMPARISONS)
        self._tokens = list_column(rows, "tokens")
        ids, ranks = scalar_column(rows, "comparison_id"), scalar_column(rows, "rank")
        paired = len(ids) % 2 == 0 and torch.equal(ids[0::2], ids[1::2])
        if not paired or bool((ranks[0::2] != 0).any()) or bool((ranks[1::2] != 1).any()):
            raise SchemaError("comparisons: each needs two rows that stand together, rank 0 (chosen) and then rank 1")
        lengths = self._tokens.lengths
        self.unit_lengths = (lengths[0::2] + lengths[1::2]).tolist()
        self.denominator = len(self.unit_lengths)

    def pack(self, units: Sequence[int], device: torch.device) -> SupervisedPack:
        if not units:
            return _nothing(device)
        packed = pack(self._tokens, [row for unit in units for row in (2 * unit, 2 * unit + 1)])
        last = packed.offsets[1:] - 1
        return SupervisedPack(packed.to(device), last.to(device), last.new_zeros(0))


def _nothing(device: torch.device) -> SupervisedPack:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return SupervisedPack(EMPTY_ROW.to(device), none, none)


def _listed(rows: Batches) -> Sequence[Any]:
    return [rows] if isinstance(rows, pa.RecordBatch | pa.Table) else rows
