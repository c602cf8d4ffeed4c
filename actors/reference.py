"""The reference: the model that the policy is held close to. It only runs forward.

``ReferenceActor`` scores rollouts while the policy trains; ``DataReferenceActor`` a data set, once, before that.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from actors.config import ReferenceConfig, SamplingConfig
from actors.deepspeed_engine import ForwardEngine
from actors.identity import DIGEST_BUCKET_BYTES, configuration_of, model_digest
from actors.models import load_causal_lm
from actors.packed import response_logprobs
from actors.reports import ColumnInfo
from actors.scoring import score_responses
from actors.sequences import score_sequences
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
        model = load_causal_lm(config.model, seed=context.seed)
        self._configuration = configuration_of(model)
        self._engine = ForwardEngine(model, context, config)

    def model_digest(self) -> str:
        """A digest of the model, the same on every rank. Collective where it is sharded."""
        return model_digest(self._configuration, self._engine.weights(DIGEST_BUCKET_BYTES))

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


class DataReferenceActor:
    """One rank of a reference that scores the responses of a data set."""

    def __init__(self, context: RankContext, config: ReferenceConfig) -> None:
        """Load the model. Collective where it is sharded.

        Raises:
            ModelError: the model cannot be loaded.
        """
        self._context = context
        self._config = config
        model = load_causal_lm(config.model, seed=context.seed)
        self._configuration = configuration_of(model)
        self._engine = ForwardEngine(model, context, config)

    def model_digest(self) -> str:
        """A digest of the model, the same on every rank. Collective where it is sharded."""
        return model_digest(self._configuration, self._engine.weights(DIGEST_BUCKET_BYTES))

    def score(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Log-probs of whole responses: the reference's column of this rank's rows of comparisons or feedback.

        Collective where the model is sharded.

        Raises:
            SchemaError: the batch is of another schema.
            ValueError: a row is longer than ``max_tokens_per_pack``.
        """
        return score_sequences(
            self._engine,
            batch,
            context=self._context,
            device=self._engine.device,
            collective=self._engine.collective,
            max_tokens=self._config.max_tokens_per_pack,
        )
