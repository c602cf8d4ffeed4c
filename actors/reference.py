"""The reference: the model that the policy is held close to. It only runs forward."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from actors.config import ReferenceConfig, SamplingConfig
from actors.deepspeed_engine import ForwardEngine
from actors.models import load_causal_lm
from actors.packed import response_logprobs
from actors.reports import ColumnInfo
from actors.scoring import score_responses
from cluster.context import RankContext
from experience.schema import REF_LOGPROBS


class ReferenceActor:
    """One rank of the reference."""

    def __init__(self, context: RankContext, config: ReferenceConfig, sampling: SamplingConfig) -> None:
        """Load the model. Collective where it is sharded.

        Raises:
            ModelError: the model cannot be loaded.
        """
        self._context = context
        self._config = config
        self._temperature = sampling.temperature
        self._engine = ForwardEngine(load_causal_lm(config.model, seed=context.seed), context, config)

    def score(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Log-probs of the response tokens at the sampling temperature: REF_LOGPROBS of this rank's rows."""
        return score_responses(
            self._engine,
            lambda model, pack: response_logprobs(model, pack, self._temperature),
            rollouts,
            context=self._context,
            device=self._engine.device,
            collective=self._engine.collective,
            max_tokens=self._config.max_tokens_per_pack,
            schema=REF_LOGPROBS,
        )
