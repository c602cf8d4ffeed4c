"""The role of every reward over text: a column of scores, and the names of the samples that have none.

Invariants:

- The column has a row for every sample of this rank, in their order. A sample without a score holds NaN, which credit
  assignment refuses: whoever takes the column leaves the rows of ``RewardInfo.dropped`` out first.
- ``score`` answers within ``RankContext.answer_within_s``: a sample that takes longer has failed.
- A failure is told with its sample, its prompt and its reason, whether the sample is dropped or given a score.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import pyarrow as pa

from actors.config import ModelConfig
from actors.models import load_tokenizer
from actors.rewards.build import build_reward
from actors.rewards.config import TextRewardConfig
from actors.rewards.failures import RewardInfo, SampleFailure, log_failures
from actors.rewards.retries import Scored, score_with_retries
from actors.rewards.rows import kept_columns, sample_texts
from actors.scoring import own_ids
from cluster.context import RankContext
from experience.packing import contiguous_split
from experience.schema import ROLLOUT, SCORES, check_schema, make_batch
from experience.tensors import list_column


class TextRewardActor:
    """One rank of a reward over text. Its methods are coroutines: many slices are under way at a time."""

    def __init__(self, context: RankContext, config: TextRewardConfig, policy_model: ModelConfig) -> None:
        """Load what scores.

        Args:
            config: any kind but `model`, which ``RewardActor`` plays.
            policy_model: whose tokenizer the samples are in.

        Raises:
            ModelError: the tokenizer, or a judge, cannot be loaded.
            RewardError: nothing can be scored as it is configured.
        """
        self._context = context
        self._config = config
        self._tokenizer = load_tokenizer(policy_model)
        self._reward = build_reward(config, context)

    async def score(
        self, rollouts: Sequence[pa.RecordBatch], prompts: Sequence[pa.RecordBatch]
    ) -> tuple[pa.RecordBatch, RewardInfo]:
        """One score a sample: SCORES of this rank's rows.

        Args:
            prompts: with the row of every prompt that the rollouts answer, in any order, others beside them.

        Raises:
            RewardError: nothing can be scored as it is configured.
            SchemaError: the batches are others, or a prompt is missing.
        """
        began = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._context.answer_within_s
        for rollout in rollouts:
            check_schema(rollout, ROLLOUT)
        lengths: list[int] = list_column(rollouts, "tokens").lengths.tolist()
        own = contiguous_split(lengths, self._context.num_ranks)[self._context.rank]
        samples = sample_texts(rollouts, own, kept_columns(prompts), self._tokenizer)
        scored = await score_with_retries(self._reward, samples, self._config, deadline)
        sample_ids = own_ids(rollouts, own)
        numbers = [math.nan if score is None else score for score in scored.scores]
        column = make_batch(SCORES, {"sample_id": sample_ids, "score": pa.array(numbers, pa.float32())})
        failures = self._failures(scored, rollouts, own, sample_ids)
        info = RewardInfo(
            num_rows=len(own),
            num_tokens=sum(lengths[row] for row in own),
            seconds=time.perf_counter() - began,
            failures=failures,
            num_failed_tries=scored.num_failed_tries,
            num_retried=scored.num_retried,
        )
        return column, info

    async def shutdown(self) -> None:
        """End the processes and connections of the reward."""
        await self._reward.close()

    def _failures(
        self, scored: Scored, rollouts: Sequence[pa.RecordBatch], own: range, sample_ids: pa.Array
    ) -> tuple[SampleFailure, ...]:
        prompts = pa.chunked_array([rollout.column("prompt_id") for rollout in rollouts], pa.int64())
        failures = tuple(
            SampleFailure(
                sample_ids[at].as_py(),
                prompts[own.start + at].as_py(),
                str(failure.reason),
                failure.detail,
                scored.scores[at] is None,
            )
            for at, failure in scored.failures.items()
        )
        log_failures(self._context.role, failures, self._config.on_failure)
        return failures
