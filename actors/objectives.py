"""What a learner learns: how rows become units and micro-batches, and a micro-batch a loss.

Here is the interface, and next-token prediction. Comparisons are in ``actors.ranking`` (reward models) and
``actors.preference`` (DPO and its kin), single judged responses in ``actors.feedback`` (KTO).

Legend: T tokens of a pack, S learnt tokens of a pack.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import ModelConfig
from actors.models import PackedModel, load_causal_lm
from actors.packed import EMPTY_ROW
from algorithms.logprobs import token_logprobs
from algorithms.losses import next_token_loss
from experience.schema import EXAMPLES, SchemaError, check_schema
from experience.tensors import Batches, PackedRows, list_column, pack

PackT = TypeVar("PackT")
LossAndMetrics = tuple[Tensor, Mapping[str, Tensor]]


class LearningBatch(ABC, Generic[PackT]):
    """A batch cut into units, which a pack never splits."""

    unit_lengths: list[int]
    #: What the loss is a mean over: learnt tokens, or comparisons, of all units.
    denominator: int

    @abstractmethod
    def pack(self, units: Sequence[int], device: torch.device) -> PackT:
        """Units laid end to end on ``device``; no units give a pack that adds nothing to loss or gradient."""


#: Sums a function of the model and a pack over all packs of a batch, on all ranks, without a gradient. Collective.
Total = Callable[[LearningBatch[Any], Callable[[nn.Module, Any], Tensor]], float]


class Objective(ABC, Generic[PackT]):
    """One way to learn from a data set."""

    @abstractmethod
    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """The model that this objective trains."""

    @abstractmethod
    def batch(self, rows: Sequence[pa.RecordBatch]) -> LearningBatch[PackT]:
        """Units of a batch of the objective's schema.

        Raises:
            SchemaError: it is not of that schema, or holds nothing to learn.
        """

    def survey(self, batch: LearningBatch[PackT], total: Total) -> None:
        """Find, before any loss of ``batch``, what its losses need to know of the whole of it. Most need nothing."""
        return

    @abstractmethod
    def loss(self, model: nn.Module, pack: PackT, denominator: int) -> LossAndMetrics:
        """Loss and metrics of a micro-batch, divided by the denominator of all micro-batches together."""

    def heldout_loss(self, model: nn.Module, pack: PackT, denominator: int) -> LossAndMetrics:
        """As ``loss``, with what is measured on held-out data alone. Parts add up."""
        return self.loss(model, pack, denominator)

    def evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to report of a held-out set, given the sums of ``heldout_loss`` over all its parts."""
        return dict(sums)


@dataclass(frozen=True)
class TokenPack:
    """Units laid end to end. ``positions_S`` are where learnt tokens are predicted from, ``targets_S`` the tokens."""

    packed: PackedRows
    positions_S: Tensor
    targets_S: Tensor


class NextToken(Objective[TokenPack]):
    """Cross-entropy of the tokens whose ``loss_mask`` is 1: pre-training and SFT."""

    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """A causal language model."""
        return load_causal_lm(config, seed=seed)

    def batch(self, rows: Sequence[pa.RecordBatch]) -> LearningBatch[TokenPack]:
        """Each row is a unit."""
        return _Examples(rows)

    def loss(self, model: nn.Module, pack: TokenPack, denominator: int) -> LossAndMetrics:
        """Mean nats a learnt token."""
        logits_SV = model(pack.packed.tokens, pack.packed.position_ids, pack.positions_S)
        logprobs_S = token_logprobs(logits_SV, pack.targets_S)
        return next_token_loss(logprobs_S, torch.ones_like(logprobs_S), denominator)

    def evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Adds ``perplexity``, e to the mean nats a token."""
        loss = sums["loss"]
        return {**sums, "perplexity": math.exp(loss) if loss < 700 else math.inf}


class _Examples(LearningBatch[TokenPack]):
    def __init__(self, rows: Batches) -> None:
        for batch in listed(rows):
            check_schema(batch, EXAMPLES)
        self._tokens, self._mask = list_column(rows, "tokens"), list_column(rows, "loss_mask")
        if not torch.equal(self._tokens.offsets, self._mask.offsets):
            raise SchemaError("examples: tokens and loss_mask of a row differ in length")
        self.unit_lengths = self._tokens.lengths.tolist()
        everything = range(self._tokens.num_rows)
        self.denominator = len(self._learnt(pack(self._tokens, everything), everything))
        if self.denominator == 0:
            raise SchemaError(f"examples: none of the {self._tokens.num_rows} rows of a batch has a token to learn")

    def pack(self, units: Sequence[int], device: torch.device) -> TokenPack:
        if not units:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return TokenPack(EMPTY_ROW.to(device), none, none)
        packed = pack(self._tokens, units)
        learnt = self._learnt(packed, units)
        return TokenPack(packed.to(device), (learnt - 1).to(device), packed.tokens[learnt].to(device))

    def _learnt(self, packed: PackedRows, units: Sequence[int]) -> Tensor:
        """Where the learnt tokens stand. A row's first token has nothing to be predicted from."""
        return ((self._mask.gather(units) > 0) & (packed.position_ids > 0)).nonzero()[:, 0]


def listed(rows: Batches) -> Sequence[Any]:
    """One batch or several, as several."""
    return [rows] if isinstance(rows, pa.RecordBatch | pa.Table) else rows
