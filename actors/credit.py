"""Credit assignment: from all columns of an iteration to advantages and returns for every token.

A role of its own, without a model and without an accelerator, because whitening is over the whole global batch and
the driver holds no tokens.

Invariants:

- Rows of the result are the rows of the rollouts, in their order.
- Policy and critic get their credit from here alone: they are blind to rewards, KL and the algorithm's discounting.
- Not one number that is not finite comes through: it is refused with the sample and the column it stands in.
- Whitening, returns and means are over all rows that are given, in float64, so they depend neither on the order of
  the rows nor on how they were cut into batches, but for the last digit.
- Returns come from the advantages before these are whitened.

Legend: N samples, T response tokens of all of them laid end to end.
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
from algorithms.config import OnlineConfig
from algorithms.kl import k1
from algorithms.rewards import per_token_rewards, shape_scores
from algorithms.statistics import explained_variance
from cluster.context import RankContext
from experience.schema import CREDIT, SchemaError, make_batch
from experience.table import join
from experience.tensors import list_array, list_column, scalar_column

Batches = Sequence[pa.RecordBatch]


class NotFinite(RoleError):
    """A score, value or log-prob is NaN or infinite."""


@dataclass(frozen=True)
class CreditReport:
    """What a batch of experience was like.

    ``metrics``, each under ``experience/``:

    - ``score``, ``score_std`` of the reward model; ``shaped_score`` after clipping and the rules for a missing EOS;
      ``reward``, that less the KL penalty: all of them means over samples, before any whitening;
    - ``kl_per_sample``, summed over a sample's tokens, and ``kl_per_token``: behaviour to reference, k1, in nats;
    - ``response_tokens``, its mean, ``response_tokens_max``, ``truncated_fraction`` of samples that did not end;
    - ``value``, ``return``, ``explained_variance``, ``advantage``, ``advantage_std`` (before whitening), over tokens;
    - ``staleness_mean``, ``staleness_max``: policy versions between drawing a token and training on it;
    - ``engine_logprob_gap``, ``engine_logprob_gap_max``: distance between the engine's log-probs and the ones that the
      policy's ranks recomputed, where they did.
    """

    metrics: dict[str, float]
    kl_coefficient: float
    seconds: float


@dataclass(frozen=True)
class _Columns:
    """The columns of N samples with T response tokens in all; numbers in float64."""

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

    def __init__(self, context: RankContext, algorithm: OnlineConfig) -> None:
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
            policy_logprobs: the same of the policy's ranks, or no batch where they are not recomputed. Where they
                are there, the KL penalty and the ratio are of them, and not of the engine's log-probs.
            policy_version: the version that training starts from.
            keep_at: where to write the iteration's experience as one Arrow file, credit included; none: nowhere.

        Raises:
            SchemaError: the columns are not of the same rows, a response is empty or ended for an unknown reason, or
                a token was drawn by a version that is yet to come.
            NotFinite: a number is NaN or infinite.
        """
        began = time.perf_counter()
        given = [rollouts, ref_logprobs, values, scores, *([policy_logprobs] if policy_logprobs else [])]
        columns = _columns(join(*given).table, policy_version, bool(policy_logprobs))
        _require_finite(columns)
        shaped_N, rewards_T = self._rewards(columns, kl_coefficient)
        whitened_T = whiten(rewards_T, shift_mean=False) if self._algorithm.reward.whiten else rewards_T
        advantages_T, returns_T = gae(
            whitened_T, columns.values_T, columns.offsets, self._algorithm.gamma, self._algorithm.gae_lambda
        )
        metrics = _metrics(columns, shaped_N, rewards_T, advantages_T, returns_T)
        if self._algorithm.whiten_advantages:
            advantages_T = whiten(advantages_T)
        credit = make_batch(
            CREDIT,
            {
                "sample_id": pa.array(columns.sample_ids_N.numpy()),
                "advantages": list_array(advantages_T.float(), columns.offsets),
                "returns": list_array(returns_T.float(), columns.offsets),
                "behaviour_logprobs": list_array(columns.behaviour_logprobs_T.float(), columns.offsets),
            },
        )
        if keep_at is not None:
            facts = {"policy_version": policy_version, "kl_coefficient": kl_coefficient}
            join(*given, [credit]).write(keep_at, facts)
        return credit, CreditReport(metrics, kl_coefficient, time.perf_counter() - began)

    def _rewards(self, columns: _Columns, kl_coefficient: float) -> tuple[Tensor, Tensor]:
        """Shaped scores (N,) and what each token earns (T,)."""
        shaping = self._algorithm.reward
        shaped_N = shape_scores(
            columns.scores_N,
            columns.finished_N,
            clip=shaping.clip,
            missing_eos_score=shaping.missing_eos_score,
            missing_eos_penalty=shaping.missing_eos_penalty,
        )
        rewards_T = per_token_rewards(
            shaped_N, columns.behaviour_logprobs_T, columns.ref_logprobs_T, columns.offsets, kl_coefficient
        )
        return shaped_N, rewards_T


def _columns(table: pa.Table, policy_version: int, recomputed: bool) -> _Columns:
    """A joined table's columns, each sample's facts checked but for its numbers being finite."""
    logprobs, versions = list_column(table, "rollout_logprobs"), list_column(table, "policy_versions")
    sample_ids = table.column("sample_id").to_pylist()
    if not sample_ids:
        raise SchemaError("experience: no rows to assign credit to")
    for sample, length in zip(sample_ids, logprobs.lengths.tolist(), strict=True):
        if length == 0:
            raise SchemaError(f"experience: the response of sample {sample} has no token to carry its score")
    reasons = table.column("finish_reason").to_pylist()
    for sample, reason in zip(sample_ids, reasons, strict=True):
        if reason not in ("stop", "length"):
            raise SchemaError(f"experience: finish_reason of sample {sample} is {reason!r}; it is stop or length")
    staleness_T = policy_version - versions.values
    if bool((ahead := staleness_T < 0).any()):
        row = _row_of(versions.offsets, token := int(ahead.nonzero()[0]))
        drawn = f"sample {sample_ids[row]} has a token of policy version {int(versions.values[token])}"
        raise SchemaError(f"experience: {drawn}, but training starts from version {policy_version}")
    return _Columns(
        sample_ids_N=torch.tensor(sample_ids, dtype=torch.int64),
        offsets=logprobs.offsets,
        scores_N=scalar_column(table, "score").double(),
        finished_N=torch.tensor([reason == "stop" for reason in reasons]),
        staleness_T=staleness_T,
        rollout_logprobs_T=logprobs.values.double(),
        ref_logprobs_T=list_column(table, "ref_logprobs").values.double(),
        values_T=list_column(table, "values").values.double(),
        policy_logprobs_T=list_column(table, "policy_logprobs").values.double() if recomputed else None,
    )


def _row_of(offsets: Tensor, token: int) -> int:
    """The row that a token of the packed values belongs to."""
    return int(torch.searchsorted(offsets, token, right=True)) - 1


def _require_finite(columns: _Columns) -> None:
    per_token = {
        "rollout_logprobs": columns.rollout_logprobs_T,
        "ref_logprobs": columns.ref_logprobs_T,
        "values": columns.values_T,
        "policy_logprobs": columns.policy_logprobs_T,
    }
    for name, column_T in per_token.items():
        if column_T is None or not bool((wrong := ~column_T.isfinite()).any()):
            continue
        row = _row_of(columns.offsets, token := int(wrong.nonzero()[0]))
        sample, at = int(columns.sample_ids_N[row]), token - int(columns.offsets[row])
        value = float(column_T[token])
        raise NotFinite(f"sample {sample}: {name} of response token {at} is {value}; it must be a finite number")
    if bool((wrong := ~columns.scores_N.isfinite()).any()):
        row = int(wrong.nonzero()[0])
        sample, score = int(columns.sample_ids_N[row]), float(columns.scores_N[row])
        raise NotFinite(f"sample {sample}: score is {score}; a reward model must give a finite number")


def _metrics(
    columns: _Columns, shaped_N: Tensor, rewards_T: Tensor, advantages_T: Tensor, returns_T: Tensor
) -> dict[str, float]:
    lengths_N = columns.offsets.diff().double()
    num_samples = len(lengths_N)
    kl_T = k1(columns.behaviour_logprobs_T, columns.ref_logprobs_T)
    metrics = {
        "score": columns.scores_N.mean(),
        "score_std": columns.scores_N.std(correction=0),
        "shaped_score": shaped_N.mean(),
        "reward": rewards_T.sum() / num_samples,
        "kl_per_sample": kl_T.sum() / num_samples,
        "kl_per_token": kl_T.mean(),
        "response_tokens": lengths_N.mean(),
        "response_tokens_max": lengths_N.max(),
        "truncated_fraction": (~columns.finished_N).double().mean(),
        "value": columns.values_T.mean(),
        "return": returns_T.mean(),
        "explained_variance": explained_variance(columns.values_T, returns_T),
        "advantage": advantages_T.mean(),
        "advantage_std": advantages_T.std(correction=0),
        "staleness_mean": columns.staleness_T.double().mean(),
        "staleness_max": columns.staleness_T.max(),
    }
    if columns.policy_logprobs_T is not None:
        gap_T = (columns.policy_logprobs_T - columns.rollout_logprobs_T).abs()
        metrics |= {"engine_logprob_gap": gap_T.mean(), "engine_logprob_gap_max": gap_T.max()}
    return {f"experience/{name}": float(value) for name, value in metrics.items()}
