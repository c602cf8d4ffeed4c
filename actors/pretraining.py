"""PPO-ptx: pre-training text that is learnt in the same optimizer update as the policy's samples.

The objective of an update is ``policy loss + coefficient * mean nats of a pre-training token`` (Ouyang et al. 2022,
equation 2). Each mean is over the tokens of its own part of the update, over all ranks, so the coefficient means the
same whatever the ratio of the two is.

Invariant: all ranks cut the same examples alike, and run as many packs as each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import nn

from actors.objectives import NextToken, TokenPack
from algorithms.logprobs import token_logprobs
from algorithms.loss_terms import pretraining_term
from algorithms.losses import Loss
from cluster.context import RankContext
from experience.packing import plan_packs


@dataclass(frozen=True)
class PretrainingPack:
    """A micro-batch of pre-training text; ``denominator`` counts the learnt tokens of the whole update."""

    tokens: TokenPack
    denominator: int


class PretrainingMix:
    """The pre-training examples of one iteration, an even share of them for each update."""

    def __init__(
        self,
        examples: Sequence[pa.RecordBatch],
        num_updates: int,
        coefficient: float,
        context: RankContext,
        device: torch.device,
        max_tokens: int,
    ) -> None:
        """``examples``: of schema EXAMPLES, at least one row for each update."""
        self._rows = pa.Table.from_batches(list(examples)).combine_chunks().to_batches()[0]
        self._num_updates = num_updates
        self._coefficient = coefficient
        self._context = context
        self._device = device
        self._max_tokens = max_tokens

    def packs(self, update: int) -> list[PretrainingPack]:
        """This rank's packs of update number ``update`` of the iteration.

        Raises:
            SchemaError: the examples are none, or hold nothing to learn.
            ValueError: one is longer than ``max_tokens``.
        """
        begin, end = (self._rows.num_rows * at // self._num_updates for at in (update, update + 1))
        batch = NextToken().batch([self._rows.slice(begin, end - begin)])
        plan = plan_packs(batch.unit_lengths, self._context.num_ranks, self._max_tokens)
        own = plan.packs[self._context.rank]
        return [PretrainingPack(batch.pack(units, self._device), batch.denominator) for units in own]

    def loss(self, model: nn.Module, pack: PretrainingPack) -> Loss:
        """The term of a micro-batch."""
        tokens = pack.tokens
        logits_SV = model(tokens.packed.tokens, tokens.packed.position_ids, tokens.positions_S)
        logprobs_S = token_logprobs(logits_SV, tokens.targets_S, 1.0)
        return pretraining_term(
            logprobs_S, torch.ones_like(logprobs_S), coefficient=self._coefficient, denominator=pack.denominator
        )
