"""KTO: a policy learns from responses that are good or bad each for itself.

Invariants:

- Log-probs are sums over response tokens alone; those of the reference stand ready before the first update.
- What gain and loss are felt from, the batch's estimate of KL(policy, reference), is of the whole batch: it is found
  before any loss, without a gradient, and is the same for every pack and rank.

Legend: N responses of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import ModelConfig
from actors.errors import RoleError
from actors.models import PackedModel, load_causal_lm
from actors.objectives import LearningBatch, LossAndMetrics, Objective, Total, listed
from actors.packed import ResponsePack, Samples
from actors.sequences import ReferenceLogprobs, response_sums
from algorithms.config import FeedbackConfig
from algorithms.kto import kto_baseline, kto_loss
from experience.schema import FEEDBACK, SchemaError, check_schema
from experience.tensors import scalar_column


@dataclass(frozen=True)
class FeedbackPack:
    """Responses laid end to end. ``sequence_ids_N`` stay on the CPU; ``num_desirable`` is of the whole batch."""

    responses: ResponsePack
    sequence_ids_N: Tensor
    desirable_N: Tensor
    num_desirable: int


class FeedbackBatch(LearningBatch[FeedbackPack]):
    """Each response is a unit.

    Args:
        column: the tokens: of the judged responses, or the mismatched ones, which stand in the same rows.
    """

    def __init__(self, rows: Sequence[pa.RecordBatch], column: str = "tokens") -> None:
        for batch in listed(rows):
            check_schema(batch, FEEDBACK)
        self._rows = rows
        self._samples = Samples(rows, column)
        self._sequence_ids = scalar_column(rows, "sequence_id")
        labels = [label for batch in listed(rows) for label in batch.column("desirable").to_pylist()]
        if not labels:
            raise SchemaError("feedback: the batch is empty")
        self._desirable, self._num_desirable = torch.tensor(labels), sum(labels)
        self.unit_lengths = self._samples.lengths
        self.denominator = len(labels)

    def mismatched(self) -> FeedbackBatch:
        """The same prompts with the responses of others."""
        return FeedbackBatch(self._rows, "mismatched_tokens")

    def pack(self, units: Sequence[int], device: torch.device) -> FeedbackPack:
        """Responses laid end to end."""
        at = torch.tensor(units, dtype=torch.int64)
        return FeedbackPack(
            self._samples.pack(units, device),
            self._sequence_ids[at],
            self._desirable[at].to(device),
            self._num_desirable,
        )


class Feedback(Objective[FeedbackPack]):
    """Kahneman-Tversky optimisation."""

    def __init__(self, config: FeedbackConfig) -> None:
        self._config = config
        self._reference: ReferenceLogprobs | None = None
        self._baseline = 0.0

    def use_reference(self, reference: ReferenceLogprobs) -> None:
        """From now on compare with these, of schema REF_FEEDBACK_LOGPROBS."""
        self._reference = reference

    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """A causal language model."""
        return load_causal_lm(config, seed=seed)

    def batch(self, rows: Sequence[pa.RecordBatch]) -> FeedbackBatch:
        """Each response is a unit."""
        return FeedbackBatch(rows)

    def survey(self, batch: LearningBatch[FeedbackPack], total: Total) -> None:
        """Estimate KL(policy, reference) from each prompt of the batch with the response to another."""
        if not isinstance(batch, FeedbackBatch):
            raise TypeError(f"expected a batch that this objective made, got {type(batch).__name__}")
        mismatched = batch.mismatched()

        def part(model: nn.Module, pack: FeedbackPack) -> Tensor:
            policy_N = response_sums(model, pack.responses)
            ref_N = self._ref(pack, "mismatched_ref_logprob").to(policy_N)
            return kto_baseline(policy_N, ref_N, denominator=mismatched.denominator)

        self._baseline = total(mismatched, part)

    def loss(self, model: nn.Module, pack: FeedbackPack, denominator: int) -> LossAndMetrics:
        """Mean over responses, judged from the baseline that ``survey`` found.

        Raises:
            RoleError: the reference's log-probs were not given.
        """
        policy_N = response_sums(model, pack.responses)
        return kto_loss(
            policy_N,
            self._ref(pack, "ref_logprob").to(policy_N),
            pack.desirable_N,
            self._baseline,
            beta=self._config.beta,
            desirable_weight=self._config.desirable_weight,
            undesirable_weight=self._config.undesirable_weight,
            num_desirable=pack.num_desirable,
            denominator=denominator,
        )

    def _ref(self, pack: FeedbackPack, column: str) -> Tensor:
        if self._reference is None:
            raise RoleError("kto compares with a reference, whose log-probs were not given")
        return self._reference.of(pack.sequence_ids_N, column)
