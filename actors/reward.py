"""The reward model: one score for each sample. It only runs forward.

Invariants:

- The score is read at the last token of prompt and response together, whatever stands beside it in the pack.
- A score that is not a finite number is no score: its sample is dropped and told of; it is never taken for a zero.
  So is a sample that is too long for the model in the model's own tokens.
  Where a model gives none at all, every prompt that is drawn in place of the dropped ones is dropped too, which ends
  the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from actors.config import ModelConfig, RewardConfig
from actors.deepspeed_engine import ForwardEngine
from actors.models import load_scorer, load_tokenizer
from actors.packed import EMPTY_ROW, in_row_order, scoring_packs
from actors.rewards.face import Reason
from actors.rewards.failures import RewardInfo, SampleFailure, log_failures
from actors.scoring import last_scores, own_ids
from cluster.context import RankContext
from experience.schema import ROLLOUT, SCORES, TOKENS, check_schema, make_batch
from experience.tensors import ListColumn, list_column, pack

NOT_FINITE = str(Reason.NOT_FINITE)
TOO_LONG = str(Reason.TOO_LONG)


class RewardActor:
    """One rank of the reward model."""

    def __init__(self, context: RankContext, config: RewardConfig, policy_model: ModelConfig) -> None:
        """Load the model. Collective where it is sharded.

        Args:
            policy_model: whose tokenizer the samples are in. Where the reward model's own gives tokens other numbers,
                samples are decoded without special tokens and encoded again, closed by EOS where they were.

        Raises:
            ModelError: a model or tokenizer cannot be loaded, or the model has not one label.
        """
        self._context = context
        self._config = config
        self._tokenizer = load_tokenizer(config.model)
        policy_tokenizer = load_tokenizer(policy_model)
        same = policy_tokenizer.get_vocab() == self._tokenizer.get_vocab()
        self._policy_tokenizer: Any = None if same else policy_tokenizer
        scorer = load_scorer(config.model, seed=context.seed)
        known = getattr(scorer.config.get_text_config(), "max_position_embeddings", None)
        self._longest = min(config.max_tokens_per_pack, known or config.max_tokens_per_pack)
        self._engine = ForwardEngine(scorer, context, config)

    def score(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, RewardInfo]:
        """One score a sample: SCORES of this rank's rows, NaN for those of ``RewardInfo.failures``.

        Raises:
            ValueError: a sample in the policy's own tokens is longer than ``max_tokens_per_pack``.
        """
        started = time.perf_counter()
        for rollout in rollouts:
            check_schema(rollout, ROLLOUT)
        tokens = list_column(rollouts, "tokens")
        too_long: dict[int, int] = {}
        if self._policy_tokenizer is not None:
            tokens, too_long = self._reencoded(rollouts)
        lengths: list[int] = tokens.lengths.tolist()
        budget, collective = self._config.max_tokens_per_pack, self._engine.collective
        own, rows = scoring_packs(lengths, self._context.rank, self._context.num_ranks, budget, collective)
        packs = [(pack(tokens, part) if part else EMPTY_ROW).to(self._engine.device) for part in rows]
        scores = [score.float().cpu() for score in self._engine.forward(packs, last_scores)]
        one_each = [torch.arange(len(part) + 1) for part in rows]
        pieces = in_row_order(rows, [s[: len(part)] for s, part in zip(scores, rows, strict=True)], one_each)
        flat = torch.cat(pieces) if pieces else torch.zeros(0)
        sample_ids = own_ids(rollouts, own)
        without = [at for at, row in enumerate(own) if row in too_long]
        flat[without] = 0.0  # of what stands in their place
        suspects: list[int] = (~flat.isfinite()).nonzero()[:, 0].tolist()
        again = [] if self._engine.collective else suspects
        if again:
            self._score_alone(flat, again, tokens, own)
        num_failed = len(suspects) + sum(not math.isfinite(flat[at]) for at in again)
        flat[without] = torch.nan
        failures = self._failures(flat, sample_ids, rollouts, own, too_long)
        column = make_batch(SCORES, {"sample_id": sample_ids, "score": pa.array(flat.numpy())})
        info = RewardInfo(
            num_rows=len(own),
            num_tokens=sum(lengths[row] for row in own),
            seconds=time.perf_counter() - started,
            failures=failures,
            num_failed_tries={
                reason: num for reason, num in ((NOT_FINITE, num_failed), (TOO_LONG, len(without))) if num
            },
            num_retried=len(again),
        )
        return column, info

    def _score_alone(self, scores: Tensor, places: Sequence[int], tokens: ListColumn, own: range) -> None:
        """Put new scores in the place of some.

        NaN spreads over a pack (a weight of 0 times NaN is NaN), and what stood beside the sample that is at fault has
        a score by itself. Where forward is collective that cannot be done: the whole pack goes without.
        """
        alone = [pack(tokens, [own[at]]).to(self._engine.device) for at in places]
        for at, score in zip(places, self._engine.forward(alone, last_scores), strict=True):
            scores[at] = score.float().cpu()[0]

    def _failures(
        self,
        scores: Tensor,
        sample_ids: pa.Array,
        rollouts: Sequence[pa.RecordBatch],
        own: range,
        too_long: Mapping[int, int],
    ) -> tuple[SampleFailure, ...]:
        prompts = pa.chunked_array([rollout.column("prompt_id") for rollout in rollouts], pa.int64())
        failures = []
        for at, score in enumerate(scores.tolist()):
            if not math.isfinite(score):
                reason, detail = NOT_FINITE, f"the model {self._config.model.path} gives {score}"
                if (num_tokens := too_long.get(own.start + at)) is not None:
                    reason = TOO_LONG
                    detail = (
                        f"{num_tokens} tokens of the model {self._config.model.path}, which takes {self._longest}: the "
                        f"least of its context and max_tokens_per_pack"
                    )
                sample, prompt = sample_ids[at].as_py(), prompts[own.start + at].as_py()
                failures.append(SampleFailure(sample, prompt, reason, detail, dropped=True))
        log_failures(self._context.role, failures)
        return tuple(failures)

    def _reencoded(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[ListColumn, dict[int, int]]:
        """The samples in the reward model's own tokens.

        And of those that are too long for it their rows and lengths; one token stands in the place of each.
        """
        theirs = self._policy_tokenizer
        encoded: list[list[int]] = []
        for rollout in rollouts:
            for row in rollout.column("tokens").to_pylist():
                text = theirs.decode(row, skip_special_tokens=True)
                closed = row[-1] == theirs.eos_token_id
                encoded.append(self._tokenizer(text)["input_ids"] + [self._tokenizer.eos_token_id] * closed)
        too_long = {at: len(row) for at, row in enumerate(encoded) if len(row) > self._longest}
        for at in too_long:
            encoded[at] = [0]
        return list_column(pa.record_batch({"tokens": pa.array(encoded, TOKENS)}), "tokens"), too_long

