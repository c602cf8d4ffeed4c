"""The reward model: one score for each sample. It only runs forward.

Invariants:

- The score is read at the last token of prompt and response together, whatever stands beside it in the pack.
- A score that is not a finite number ends the run naming the sample; it is never taken for a zero.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from actors.config import ModelConfig, RewardConfig
from actors.deepspeed_engine import ForwardEngine
from actors.errors import ScoreError
from actors.models import load_scorer, load_tokenizer
from actors.packed import EMPTY_ROW, in_row_order, scoring_packs
from actors.reports import ColumnInfo
from actors.scoring import last_scores, own_ids
from cluster.context import RankContext
from experience.schema import ROLLOUT, SCORES, TOKENS, check_schema, make_batch
from experience.tensors import ListColumn, list_column, pack


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
        self._engine = ForwardEngine(load_scorer(config.model, seed=context.seed), context, config)

    def score(self, rollouts: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """One score a sample: SCORES of this rank's rows.

        Raises:
            ScoreError: a score is NaN or infinite.
            ValueError: a sample is longer than ``max_tokens_per_pack``.
        """
        started = time.perf_counter()
        for rollout in rollouts:
            check_schema(rollout, ROLLOUT)
        tokens = list_column(rollouts, "tokens")
        if self._policy_tokenizer is not None:
            tokens = self._reencoded(rollouts)
        lengths: list[int] = tokens.lengths.tolist()
        budget, collective = self._config.max_tokens_per_pack, self._engine.collective
        own, rows = scoring_packs(lengths, self._context.rank, self._context.num_ranks, budget, collective)
        packs = [(pack(tokens, part) if part else EMPTY_ROW).to(self._engine.device) for part in rows]
        scores = [score.float().cpu() for score in self._engine.forward(packs, last_scores)]
        one_each = [torch.arange(len(part) + 1) for part in rows]
        pieces = in_row_order(rows, [s[: len(part)] for s, part in zip(scores, rows, strict=True)], one_each)
        flat = torch.cat(pieces) if pieces else torch.zeros(0)
        sample_ids = own_ids(rollouts, own)
        self._require_finite(flat, sample_ids, tokens, own)
        column = make_batch(SCORES, {"sample_id": sample_ids, "score": pa.array(flat.numpy())})
        info = ColumnInfo(len(own), sum(lengths[row] for row in own), time.perf_counter() - started)
        return column, info

    def _require_finite(self, scores: Tensor, sample_ids: pa.Array, tokens: ListColumn, own: range) -> None:
        """Raise for the samples whose scores are not finite by their own fault.

        NaN spreads over a pack (a weight of 0 times NaN is NaN), so suspects are scored again, each alone; where
        forward is collective that cannot be done, and the whole pack is named.
        """
        suspects = (~scores.isfinite()).nonzero()[:, 0].tolist()
        if not suspects:
            return
        guilty = suspects
        if not self._engine.collective:
            alone = [pack(tokens, [own[at]]).to(self._engine.device) for at in suspects]
            again = self._engine.forward(alone, last_scores)
            guilty = [at for at, score in zip(suspects, again, strict=True) if not bool(score.isfinite().all())]
        names = ", ".join(str(sample_ids[at].as_py()) for at in (guilty or suspects)[:5])
        raise ScoreError(
            f"{self._context.role}: the score of sample {names} is not finite ({len(guilty)} of {len(scores)} are "
            f"not); the model is {self._config.model.path}"
        )

    def _reencoded(self, rollouts: Sequence[pa.RecordBatch]) -> ListColumn:
        """The samples in the reward model's own tokens."""
        theirs = self._policy_tokenizer
        encoded: list[list[int]] = []
        for rollout in rollouts:
            for row in rollout.column("tokens").to_pylist():
                text = theirs.decode(row, skip_special_tokens=True)
                closed = row[-1] == theirs.eos_token_id
                encoded.append(self._tokenizer(text)["input_ids"] + [self._tokenizer.eos_token_id] * closed)
        return list_column(pa.record_batch({"tokens": pa.array(encoded, TOKENS)}), "tokens")

