"""Preference optimisation: a policy learns from pairs of responses, with no reward model in between.

Invariant: log-probs are sums over response tokens alone; those of the reference are of the model that training
started from, and stand ready (``ReferenceLogprobs``) before the first update.

Legend: N responses and P pairs of a pack, S response tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.comparisons import ComparisonPack, Comparisons
from actors.config import ModelConfig
from actors.errors import RoleError
from actors.models import PackedModel, load_causal_lm
from actors.objectives import LearningBatch, LossAndMetrics, Objective
from actors.sequences import ReferenceLogprobs
from algorithms import preferences
from algorithms.config import PreferenceConfig
from algorithms.logprobs import token_logprobs
from algorithms.loss_terms import add_terms
from experience.schema import SchemaError
from experience.tensors import prediction_positions


class PairBatch(LearningBatch[ComparisonPack]):
    """Each pair is a unit."""

    def __init__(self, rows: Sequence[pa.RecordBatch]) -> None:
        self._comparisons = Comparisons(rows)
        self.unit_lengths = self._comparisons.unit_lengths
        self.denominator = self._comparisons.num_comparisons
        if max(self._comparisons.sizes) > 2:
            raise SchemaError(
                f"comparisons: preference losses are over pairs, and one has {max(self._comparisons.sizes)} responses"
            )
        if bool((self._comparisons.ranks[1::2] == 0).any()):
            raise SchemaError("comparisons: preference losses need a chosen and a rejected response, and one is a tie")

    def pack(self, units: Sequence[int], device: torch.device) -> ComparisonPack:
        """Pairs laid end to end."""
        return self._comparisons.pack(units, device)


class Preference(Objective[ComparisonPack]):
    """DPO and its kin."""

    def __init__(self, config: PreferenceConfig) -> None:
        self._config = config
        self._reference: ReferenceLogprobs | None = None

    def use_reference(self, reference: ReferenceLogprobs) -> None:
        """From now on compare with these."""
        self._reference = reference

    def load(self, config: ModelConfig, seed: int) -> PackedModel:
        """A causal language model."""
        return load_causal_lm(config, seed=seed)

    def batch(self, rows: Sequence[pa.RecordBatch]) -> LearningBatch[ComparisonPack]:
        """Each pair is a unit."""
        return PairBatch(rows)

    def loss(self, model: nn.Module, pack: ComparisonPack, denominator: int) -> LossAndMetrics:
        """The configured loss over pairs, with the NLL term where it has a weight.

        Raises:
            RoleError: the loss needs the reference's log-probs, and they were not given.
        """
        logprobs_N, lengths_N = response_sums(model, pack)
        chosen, rejected = logprobs_N[0::2], logprobs_N[1::2]
        lengths = lengths_N[0::2], lengths_N[1::2]
        terms = [
            self._with_reference(chosen, rejected, pack, denominator)
            if self._config.needs_reference
            else self._without_reference(chosen, rejected, lengths, denominator)
        ]
        coefficient = 1.0 if self._config.name == "orpo" else self._config.nll_coefficient
        if coefficient:
            terms.append(preferences.nll_term(chosen, lengths[0], coefficient=coefficient, denominator=denominator))
        return add_terms(*terms)

    def _with_reference(
        self, chosen: Tensor, rejected: Tensor, pack: ComparisonPack, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self._reference is None:
            raise RoleError(f"{self._config.name} compares with a reference, whose log-probs were not given")
        ref_N = self._reference.of(pack.sequence_ids_N).to(chosen)
        four = (chosen, rejected, ref_N[0::2], ref_N[1::2])
        beta, smoothing = self._config.beta, self._config.label_smoothing
        match self._config.name:
            case "dpo":
                return preferences.dpo_loss(*four, beta=beta, denominator=denominator)
            case "conservative_dpo":
                return preferences.conservative_dpo_loss(
                    *four, beta=beta, label_smoothing=smoothing, denominator=denominator
                )
            case "robust_dpo":
                return preferences.robust_dpo_loss(
                    *four, beta=beta, label_smoothing=smoothing, denominator=denominator
                )
            case "ipo":
                return preferences.ipo_loss(*four, beta=beta, denominator=denominator)
            case "hinge":
                return preferences.hinge_loss(*four, beta=beta, denominator=denominator)
            case name:
                raise RoleError(f"{name} has no loss against a reference")

    def _without_reference(
        self, chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta, margin = self._config.beta, self._config.target_margin
        match self._config.name:
            case "reference_free_dpo":
                return preferences.reference_free_dpo_loss(chosen, rejected, beta=beta, denominator=denominator)
            case "slic":
                return preferences.slic_loss(chosen, rejected, margin=margin, denominator=denominator)
            case "simpo":
                return preferences.simpo_loss(
                    chosen, rejected, *lengths, beta=beta, gamma=margin, denominator=denominator
                )
            case "orpo":
                return preferences.orpo_loss(
                    chosen, rejected, *lengths, coefficient=self._config.odds_coefficient, denominator=denominator
                )
            case name:
                raise RoleError(f"{name} has no loss without a reference")


def response_sums(model: nn.Module, pack: ComparisonPack) -> tuple[Tensor, Tensor]:
    """Summed log-probs (N,) of each response's tokens, and their numbers (N,)."""
    device = pack.packed.tokens.device
    lengths_N = pack.packed_offsets.diff() - pack.prompt_tokens_N
    if pack.is_empty:
        positions_S = torch.zeros(0, dtype=torch.int64, device=device)
    else:
        positions_S = prediction_positions(pack.packed_offsets, pack.prompt_tokens_N).to(device)
    logits_SV = model(pack.packed.tokens, pack.packed.position_ids, positions_S)
    logprobs_S = token_logprobs(logits_SV, pack.packed.tokens[positions_S + 1])
    offsets = torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)]).to(device)
    return preferences.sequence_logprobs(logprobs_S, offsets), lengths_N.to(device)
