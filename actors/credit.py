"""Credit assignment: from all columns of an iteration to advantages and returns for every token.

A role of its own, without a model and without an accelerator, because whitening is over the whole global batch and
the driver holds no tokens.

Invariants:

- Rows of the result are the rows of the rollouts, in their order.
- Policy and critic get their credit from here alone: they are blind to rewards, KL and the algorithm's discounting.
- Not one number that is not finite comes through: it is refused with the sample and the column it stands in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from actors.errors import RoleError
from algorithms.advantages import gae, whiten
from algorithms.config import PPOConfig
from algorithms.kl import k1
from algorithms.rewards import per_token_rewards, shape_scores
from cluster.context import RankContext
from experience.schema import CREDIT, REF_LOGPROBS, SCORES, VALUES, make_batch
from experience.table import join
from experience.tensors import list_array, list_column, scalar_column

Batches = Sequence[pa.RecordBatch]


class NotFinite(RoleError):
    """A score, value or log-prob is NaN or infinite."""


@dataclass(frozen=True)
class CreditReport:
    """What a batch of experience was like: means over its samples or tokens, as the names say."""

    metrics: dict[str, float]
    kl_coefficient: float
    seconds: float


@dataclass(frozen=True)
class _Columns:
    """The columns of N samples with T response tokens in all."""

    sample_ids_N: Tensor
    offsets: Tensor
    scores_N: Tensor
    finished_N: Tensor
    staleness_T: Tensor
    rollout_logprobs_T: Tensor
    ref_logprobs_T: Tensor
    values_T: Tensor
    policy_logprobs_T: Tensor | None

    @property
    def behaviour_logprobs_T(self) -> Tensor:
        """What the ratio divides by: recomputed by the policy's ranks where configured, else the engine's own."""
        return self.rollout_logprobs_T if self.policy_logprobs_T is None else self.policy_logprobs_T


class CreditActor:
    """Computes rewards, advantages and returns."""

    def __init__(self, context: RankContext, algorithm: PPOConfig) -> None:
        torch.set_num_threads(context.num_threads)
        self._algorithm = algorithm

    def assign(
        self,
        rollouts: Batches,
        ref_logprobs: Batches,
        values: Batches,
        scores: Batches,
        policy_logprobs: Batches,
        kl_coefficient: float,
        policy_version: int,
        keep_at: Path | None,
    ) -> tuple[pa.RecordBatch, CreditReport]:
        """The CREDIT of an iteration's rows.

        Args:
            rollouts, ref_logprobs, values, scores: the iteration's columns, each in one or several batches.
            policy_logprobs: the same of the policy's ranks, or no batch where they are not recomputed.
            policy_version: the version that training starts from.
            keep_at: where to write the iteration's experience as one Arrow file, credit included; none: nowhere.

        Raises:
            SchemaError: the columns are not of the same rows.
            NotFinite: a number is NaN or infinite.
        """
        began = time.perf_counter()
        columns = [rollouts, ref_logprobs, values, scores, *([policy_logprobs] if policy_logprobs else [])]
        experience = join(*columns)
        table = _columns(experience.table, policy_version, bool(policy_logprobs))
        _require_finite(table)
        settings = self._algorithm
        shaped_N = shape_scores(
            table.scores_N,
            table.finished_N,
            clip=settings.reward.clip,
            missing_eos_score=settings.reward.missing_eos_score,
            missing_eos_penalty=settings.reward.missing_eos_penalty,
        )
        rewards_T = per_token_rewards(
            shaped_N, table.behaviour_logprobs_T, table.ref_logprobs_T, table.offsets, kl_coefficient
        )
        if settings.reward.whiten:
            rewards_T = whiten(rewards_T, shift_mean=False)
        advantages_T, returns_T = gae(rewards_T, table.values_T, table.offsets, settings.gamma, settings.gae_lambda)
        metrics = _metrics(table, shaped_N, advantages_T, returns_T)
        credit = make_batch(
            CREDIT,
            {
                "sample_id": pa.array(table.sample_ids_N.numpy()),
                "advantages": list_array(
                    whiten(advantages_T) if settings.whiten_advantages else advantages_T, table.offsets
                ),
                "returns": list_array(returns_T, table.offsets),
                "behaviour_logprobs": list_array(table.behaviour_logprobs_T, table.offsets),
            },
        )
        if keep_at is not None:
            join(*columns, [credit]).write(keep_at, {"policy_version": policy_version, "kl_coefficient": kl_coefficient})
        return credit, CreditReport(metrics, kl_coefficient, time.perf_counter() - began)


def _columns(table: pa.Table, policy_version: int, recomputed: bool) -> _Columns:
    logprobs = list_column(table, "rollout_logprobs")
    finished = [reason == "stop" for reason in table.column("finish_reason").to_pylist()]
    return _Columns(
        sample_ids_N=scalar_column(table, "sample_id"),
        offsets=logprobs.offsets,
        scores_N=scalar_column(table, "score"),
        finished_N=torch.tensor(finished, dtype=torch.bool),
        staleness_T=policy_version - list_column(table, "policy_versions").values,
        rollout_logprobs_T=logprobs.values,
        ref_logprobs_T=list_column(table, "ref_logprobs").values,
        values_T=list_column(table, "values").values,
        policy_logprobs_T=list_column(table, "policy_logprobs").values if recomputed else None,
    )


def _require_finite(table: _Columns) -> None:
    per_token = {
        "rollout_logprobs": table.rollout_logprobs_T,
        REF_LOGPROBS.names[1]: table.ref_logprobs_T,
        VALUES.names[1]: table.values_T,
        "policy_logprobs": table.policy_logprobs_T,
    }
    for name, column_T in per_token.items():
        if column_T is not None and not bool(column_T.isfinite().all()):
            token = int((~column_T.isfinite()).nonzero()[0])
            row = int(torch.searchsorted(table.offsets, token, right=True)) - 1
            at = token - int(table.offsets[row])
            raise NotFinite(
                f"sample {int(table.sample_ids_N[row])}: {name} of response token {at} is {float(column_T[token])}"
            )
    if not bool(table.scores_N.isfinite().all()):
        row = int((~table.scores_N.isfinite()).nonzero()[0])
        sample, value = int(table.sample_ids_N[row]), float(table.scores_N[row])
        raise NotFinite(f"sample {sample}: {SCORES.names[1]} is {value}; a reward model must give a finite number")


def _metrics(table: _Columns, shaped_N: Tensor, advantages_T: Tensor, returns_T: Tensor) -> dict[str, float]:
    lengths_N = table.offsets.diff()
    kl_T = k1(table.behaviour_logprobs_T, table.ref_logprobs_T)
    spread = returns_T.var(correction=0)
    unexplained = (returns_T - table.values_T).var(correction=0)
    metrics = {
        "score": table.scores_N.mean(),
        "score_std": table.scores_N.std(correction=0),
        "shaped_score": shaped_N.mean(),
        "kl_per_sample": kl_T.sum() / len(lengths_N),
        "kl_per_token": kl_T.mean(),
        "response_tokens": lengths_N.float().mean(),
        "response_tokens_max": lengths_N.max(),
        "truncated_fraction": (~table.finished_N).float().mean(),
        "value": table.values_T.mean(),
        "return": returns_T.mean(),
        "explained_variance": 1 - unexplained / spread if spread > 0 else torch.zeros(()),
        "advantage": advantages_T.mean(),
        "advantage_std": advantages_T.std(correction=0),
        "staleness_mean": table.staleness_T.float().mean(),
        "staleness_max": table.staleness_T.max(),
    }
    if table.policy_logprobs_T is not None:
        gap_T = (table.policy_logprobs_T - table.rollout_logprobs_T).abs()
        metrics |= {"engine_logprob_gap": gap_T.mean(), "engine_logprob_gap_max": gap_T.max()}
    return {f"experience/{name}": float(value) for name, value in metrics.items()}
