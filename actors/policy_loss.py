"""The loss of a policy's micro-batch: the algorithm's own, and the terms that the configuration adds to it.

Legend: S response tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import SamplingConfig
from actors.metric_totals import MAX_SUFFIX
from actors.packed import ResponsePack, Samples
from actors.updates import Size
from algorithms.bundles import LossInputs, algorithm_of
from algorithms.config import OnlineConfig
from algorithms.kl import LOSS_ESTIMATORS
from algorithms.logprobs import entropy, token_logprobs
from algorithms.loss_terms import (
    add_terms,
    constant_length_weights,
    entropy_bonus,
    kl_term,
    sequence_mean_weights,
    token_mean_weights,
)
from algorithms.losses import Loss
from experience.schema import CREDIT, CREDIT_WITH_RETURNS, REF_LOGPROBS, check_schema, require_same_rows, schema_name
from experience.tensors import ListColumn, list_column

#: Of the first minibatch these tell whether engine and trainer agree; of later ones they mean nothing.
DEVIATION = f"ratio_deviation{MAX_SUFFIX}"
GAP = "logprob_gap"


@dataclass(frozen=True)
class PolicyPack:
    """A micro-batch with its credit, each (S,); ``ref_logprobs_S`` where the KL is in the loss."""

    samples: ResponsePack
    advantages_S: Tensor
    behaviour_logprobs_S: Tensor
    loss_weights_S: Tensor
    ref_logprobs_S: Tensor | None


class PolicyBatch:
    """An iteration's samples with their credit."""

    def __init__(
        self,
        ids: pa.ChunkedArray,
        samples: Samples,
        credit: Sequence[pa.RecordBatch],
        reference: Sequence[pa.RecordBatch],
    ) -> None:
        """Check that all columns are of the samples ``ids``.

        Raises:
            SchemaError: one of them is not.
        """
        for batch in credit:
            check_schema(batch, CREDIT_WITH_RETURNS if schema_name(batch.schema) == "credit_with_returns" else CREDIT)
        for batch in reference:
            check_schema(batch, REF_LOGPROBS)
        for columns in (credit, reference):
            if columns:
                require_same_rows(ids, pa.Table.from_batches(list(columns)))
        self._samples = samples
        self._advantages = list_column(credit, "advantages")
        self._behaviour = list_column(credit, "behaviour_logprobs")
        self._weights = list_column(credit, "loss_weights")
        self._reference = list_column(reference, "ref_logprobs") if reference else None

    def pack(self, rows: Sequence[int], device: torch.device) -> PolicyPack:
        """``rows`` laid end to end on ``device``; no rows give the empty pack."""

        def column(values: ListColumn) -> Tensor:
            return values.gather(rows).to(device)

        return PolicyPack(
            self._samples.pack(rows, device),
            column(self._advantages),
            column(self._behaviour),
            column(self._weights),
            None if self._reference is None else column(self._reference),
        )


class PolicyObjective:
    """Gives a micro-batch its loss and metrics."""

    def __init__(self, config: OnlineConfig, sampling: SamplingConfig) -> None:
        """
        Raises:
            AlgorithmError: the algorithm is one of the user's own, and cannot be imported here.
        """
        self._config = config
        self._temperature = sampling.temperature
        self._max_response_tokens = sampling.max_response_tokens
        self._algorithm_loss = algorithm_of(config.name).loss

    def loss(
        self, model: nn.Module, pack: PolicyPack, size: Size, kl_coefficient: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Of a micro-batch, divided by the size of the whole minibatch.

        The weights of credit assignment are of the algorithm's own loss alone; entropy and KL are over all tokens,
        normalised in the same way.
        """
        samples, config = pack.samples, self._config
        logits_SV = model(samples.packed.tokens, samples.packed.position_ids, samples.positions_S)
        logprobs_S = token_logprobs(logits_SV, samples.targets_S, self._temperature)
        normalisation_S = self._normalisation(logprobs_S, samples.offsets, size)
        inputs = LossInputs(
            policy_logprobs_T=logprobs_S,
            behaviour_logprobs_T=pack.behaviour_logprobs_S,
            advantages_T=pack.advantages_S,
            offsets=samples.offsets,
            weights_T=normalisation_S * pack.loss_weights_S,
            denominator=size.num_tokens,
            config=config,
        )
        terms = [self._algorithm_loss(inputs), self._entropy(logits_SV, normalisation_S, size)]
        if config.kl.placement == "loss" and pack.ref_logprobs_S is not None:
            terms.append(
                kl_term(
                    logprobs_S,
                    pack.ref_logprobs_S,
                    LOSS_ESTIMATORS[config.kl.estimator_used],
                    coefficient=kl_coefficient,
                    weights_T=normalisation_S,
                    denominator=size.num_tokens,
                )
            )
        loss, metrics = add_terms(*terms)
        return loss, metrics | _agreement(logprobs_S.detach(), pack.behaviour_logprobs_S, metrics, size)

    def _entropy(self, logits_SV: Tensor, weights_S: Tensor, size: Size) -> Loss:
        coefficient = self._config.entropy_coefficient
        with torch.set_grad_enabled(coefficient > 0):
            entropy_S = entropy(logits_SV, self._temperature)
        bonus, metrics = entropy_bonus(
            entropy_S, coefficient=coefficient, weights_T=weights_S, denominator=size.num_tokens
        )
        # 0 times an entropy that is not a number would be none either.
        return (bonus if coefficient else bonus.new_zeros(())), metrics

    def _normalisation(self, like_S: Tensor, offsets: Tensor, size: Size) -> Tensor:
        num_tokens, num_samples = size.num_tokens, size.num_samples
        match self._config.normalise:
            case "tokens":
                return token_mean_weights(like_S)
            case "sequences":
                return sequence_mean_weights(like_S, offsets, num_tokens=num_tokens, num_samples=num_samples)
            case "constant":
                longest = self._max_response_tokens
                return constant_length_weights(
                    like_S, num_tokens=num_tokens, num_samples=num_samples, max_tokens=longest
                )


@torch.no_grad()
def _agreement(
    logprobs_S: Tensor, behaviour_S: Tensor, metrics: Mapping[str, Tensor], size: Size
) -> dict[str, Tensor]:
    difference_S = logprobs_S - behaviour_S
    deviation_S = difference_S.exp().sub(1).abs()
    clipped = [metrics[name] for name in ("clip_fraction_low", "clip_fraction_high") if name in metrics]
    return {
        DEVIATION: deviation_S.max() if len(deviation_S) else deviation_S.sum(),
        GAP: difference_S.abs().sum() / size.num_tokens,
        **({"clip_fraction": torch.stack(clipped).sum()} if clipped else {}),
    }
