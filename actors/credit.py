"""Credit assignment: from all columns of an iteration to an advantage for every token, and returns for a critic.

A role of its own, without a model and without an accelerator, because whitening and groups are over the whole global
batch and the driver holds no tokens.

Invariants:

- Rows of the result are the rows of the rollouts, in their order.
- Policy and critic get their credit from here alone: they are blind to rewards, KL in the reward, discounting, and to
  which algorithm (``algorithms.bundles``) made it.
- Not one number that is not finite comes through: it is refused with the sample and the column it stands in.
- Whitening, returns and means are over all rows that are given, in float64, so they depend neither on the order of
  the rows nor on how they were cut into batches, but for the last digit.
- Returns come from the advantages before these are whitened.

Legend: N samples, T response tokens of all of them laid end to end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from actors.credit_columns import CreditColumns, read_columns
from actors.environment_credit import environment_scores, moved_to_tokens
from actors.rewards.combination import COMBINED, Total
from actors.rewards.combination_config import TotalConfig
from actors.rollout import RolloutInfo
from actors.score_columns import ENVIRONMENT, UNNAMED, Totals, safety_prompts
from actors.selection import baseline_column, prompts_without_signal, rows_of_prompts
from algorithms.advantages import whiten
from algorithms.bundles import CreditInputs, algorithm_of
from algorithms.config import OnlineConfig
from algorithms.corrections import Weights, masked_weights, sequence_masked_weights, truncated_weights
from algorithms.group_advantages import groups_without_signal
from algorithms.kl import ESTIMATORS, k1
from algorithms.moments import RunningMoments
from algorithms.packed import spread
from algorithms.rewards import per_token_rewards
from algorithms.statistics import explained_variance
from cluster.context import RankContext
from experience.schema import CREDIT, CREDIT_WITH_RETURNS, SCORES, make_batch
from experience.table import Experience, join
from experience.tensors import list_array

Batches = Sequence[pa.RecordBatch]


@dataclass(frozen=True)
class CreditReport:
    """What a batch of experience was like.

    ``metrics``, each under ``experience/``:

    - ``score``, ``score_std`` of what the rewards were combined to; ``shaped_score`` after all shaping; ``reward``,
      that less the KL penalty where it is in the reward: all of them means over samples;
    - ``turns``, their mean, where samples have several;
    - ``response_tokens``, its mean, ``response_tokens_max``, ``truncated_fraction`` of samples that did not end;
    - ``advantage``, ``advantage_std`` (before whitening), over tokens;
    - ``staleness_mean``, ``staleness_max``: policy versions between drawing a token and training on it;
    - with a reference, ``kl_per_sample``, summed over a sample's tokens, and ``kl_per_token``: behaviour to reference,
      k1, in nats;
    - with a critic, ``value``, ``return``, ``explained_variance``, over tokens;
    - with a baseline, ``baseline_score``, its mean over samples;
    - with groups, ``no_signal_fraction`` of samples in whose group all scores are equal;
    - where the policy's ranks recompute log-probs, ``engine_logprob_gap``, ``engine_logprob_gap_max``: distance between
      the engine's and theirs, which are of newer weights where generation runs ahead;
    - with a correction, ``correction_fraction`` of tokens that it cut or masked, ``correction_weight``, the mean
      weight, and ``correction_kl``, k3 of KL(engine, policy's ranks) in nats.

    And, each under ``reward/``, the mean of every term of ``rewards.combination.Total``: each reward by its name, the
    change that each shaping made by its, ``combined`` and ``total``, with ``_std`` for rewards and the total.

    ``moments`` are the running ones of shaping, this batch included.
    """

    metrics: dict[str, float]
    kl_coefficient: float
    seconds: float
    moments: Mapping[str, RunningMoments] = field(default_factory=dict)


class CreditActor:
    """Computes rewards, advantages and returns."""

    def __init__(
        self,
        context: RankContext,
        config: OnlineConfig,
        max_response_tokens: int,
        rewards: Sequence[str] = (UNNAMED,),
        total: TotalConfig | None = None,
    ) -> None:
        """Import the algorithm.

        Args:
            max_response_tokens: the longest response that generation allows.
            rewards: their names, in the order that their scores come in.
            total: how they become one score; none: as they are, added up.

        Raises:
            AlgorithmError: the algorithm is one of the user's own, and cannot be imported here.
        """
        torch.set_num_threads(context.num_threads)
        self._config = config
        self._algorithm = algorithm_of(config.name)
        self._total = total or TotalConfig()
        self._totals = Totals(rewards, self._total, max_response_tokens)

    def assign(
        self,
        rollouts: Batches,
        ref_logprobs: Batches,
        values: Batches,
        scores: Batches,
        policy_logprobs: Batches,
        baseline_scores: Batches,
        kl_coefficient: float,
        policy_version: int,
        keep_at: Path | None,
        moments: Mapping[str, RunningMoments] | None = None,
    ) -> tuple[pa.RecordBatch, CreditReport]:
        """The CREDIT of an iteration's rows; with values CREDIT_WITH_RETURNS.

        Args:
            rollouts: the iteration's samples, in one or several batches.
            scores: of the same rows, reward after reward (``score_columns``).
            ref_logprobs, values, baseline_scores: the same, or no batch where the run has no such role.
            policy_logprobs: the same of the policy's ranks, or no batch where they are not recomputed. Where they
                are there, the KL penalty and the ratio are of them, and not of the engine's log-probs.
            policy_version: the version that training starts from.
            keep_at: where to write the iteration's experience as one Arrow file, credit included; none: nowhere.
            moments: of shaping by running moments, as the last call's report gave them.

        Raises:
            SchemaError: the columns are not of the same rows, a response is empty or ended for an unknown reason, or
                a token was drawn by a version that is yet to come.
            NotFinite: a number is NaN or infinite.
            AlgorithmError: the algorithm lacks something that the run does not have.
        """
        began = time.perf_counter()
        parts = (rollouts, ref_logprobs, values, policy_logprobs, baseline_scores)
        given = [part for part in parts if part]
        table = join(*given).table
        columns = read_columns(table, policy_version)
        scores_of = self._totals.read(scores, table.column("sample_id"))
        total = self._totals.of(table, scores_of, moments)
        rewards_T = self._rewards(columns, total.scores_N, kl_coefficient)
        if ENVIRONMENT in scores_of:
            weights_N = self._totals.weights(ENVIRONMENT, table, scores_of, moments)
            rewards_T = rewards_T + moved_to_tokens(table, columns.offsets, weights_N)
        inputs = self._inputs(columns, rewards_T)
        advantages_T, returns_T = self._algorithm.credit(inputs)
        weights_T, corrected = self._weights(columns)
        metrics = _metrics(columns, total, rewards_T, advantages_T, returns_T) | corrected
        metrics |= {f"reward/{name}": value for name, value in total.metrics().items()}
        if self._config.whiten_advantages:
            advantages_T = whiten(advantages_T)
        credit = _credit(columns, advantages_T, returns_T, weights_T)
        if keep_at is not None:
            facts = {"policy_version": policy_version, "kl_coefficient": kl_coefficient}
            kept = self._totals.with_scores(join(*given, [credit]).table, scores_of, total)
            Experience(kept).write(keep_at, facts)
        return credit, CreditReport(metrics, kl_coefficient, time.perf_counter() - began, total.moments)

    def without_signal(self, rollouts: Batches, scores: Batches) -> tuple[int, ...]:
        """Prompts whose samples all have the same score, before any shaping: nothing is learnt from them."""
        table = join(rollouts).table
        scores_of = self._totals.read(scores, table.column("sample_id"))
        return prompts_without_signal(table, self._totals.combined(table, scores_of))

    def combine(self, rollouts: Batches, scores: Batches) -> tuple[pa.RecordBatch, int]:
        """SCORES of the rollouts' rows: what the rewards come to, before any shaping; NaN where one has no score."""
        table = join(rollouts).table
        combined_N = self._totals.combined_or_nan(table, scores)
        ids = table.column("sample_id").combine_chunks()
        batch = make_batch(SCORES, {"sample_id": ids, "score": pa.array(combined_N.float().numpy())})
        return batch, batch.num_rows

    def safety_prompts(self, rollouts: Batches, prompts: Batches) -> tuple[pa.RecordBatch, int]:
        """SCORES that stand behind the rewards' where the combination wants to know which prompts are of safety.

        Raises:
            SchemaError: a prompt's row is not among ``prompts``, or keeps no such column.
        """
        tags = safety_prompts(rollouts, prompts, self._total)
        return tags, tags.num_rows

    def environment_scores(self, rollouts: Batches) -> tuple[pa.RecordBatch, int]:
        """SCORES of what an environment gave, summed over each sample."""
        scores = environment_scores(rollouts)
        return scores, scores.num_rows

    def select(
        self, columns: Batches, rollouts: Batches, prompt_ids: Sequence[int]
    ) -> tuple[pa.RecordBatch, RolloutInfo]:
        """The rows of ``columns``, which are of the same samples as ``rollouts``, that answer some prompts."""
        return rows_of_prompts(columns, rollouts, prompt_ids)

    def baseline(
        self, rollouts: Batches, baseline_rollouts: Batches, baseline_scores: Batches
    ) -> tuple[pa.RecordBatch, int]:
        """BASELINE_SCORES of the rollouts' rows: the shaped score of the baseline's response to the same prompt.

        Raises:
            SchemaError: a prompt has no baseline, or two.
        """
        table = join(baseline_rollouts).table
        # Of prompts that were dropped it may have none.
        scores_of = self._totals.read(baseline_scores, table.column("sample_id"), finite=False)
        shaped_N = self._totals.of(table, scores_of).scores_N
        return baseline_column(rollouts, table.column("prompt_id").to_pylist(), shaped_N.tolist())

    def _rewards(self, columns: CreditColumns, scores_N: Tensor, kl_coefficient: float) -> Tensor:
        """What each token earns (T,)."""
        behaviour_T, reference_T = columns.behaviour_logprobs_T, columns.ref_logprobs_T
        if reference_T is None or self._config.kl.placement == "loss":
            reference_T, kl_coefficient = behaviour_T, 0.0
        estimator = ESTIMATORS[self._config.kl.estimator_used]
        return per_token_rewards(scores_N, behaviour_T, reference_T, columns.offsets, kl_coefficient, estimator)

    def _inputs(self, columns: CreditColumns, rewards_T: Tensor) -> CreditInputs:
        return CreditInputs(
            rewards_T=whiten(rewards_T, shift_mean=False) if self._config.whiten_rewards else rewards_T,
            offsets=columns.offsets,
            group_ids_N=columns.prompt_ids_N,
            values_T=columns.values_T,
            baseline_scores_N=columns.baseline_scores_N,
            turn_offsets=columns.turn_offsets,
            gamma=self._config.gamma,
            gae_lambda=self._config.gae_lambda,
        )

    def _weights(self, columns: CreditColumns) -> tuple[Tensor, dict[str, float]]:
        """What each token's policy loss is weighed with (T,), and what a correction touched."""
        weights_T, metrics = _correction(self._config, columns)
        if self._config.mask_truncated:
            weights_T = weights_T * spread(columns.finished_N.double(), columns.offsets)
        return weights_T, {f"experience/{name}": float(value) for name, value in metrics.items()}


def _correction(config: OnlineConfig, columns: CreditColumns) -> Weights:
    """Weights (T,) of tokens for who drew them, and metrics."""
    rollout_T, denominator = columns.rollout_logprobs_T, float(len(columns.rollout_logprobs_T))
    proximal_T, correction = columns.policy_logprobs_T, config.correction
    if proximal_T is None or correction.method == "none":
        return torch.ones_like(rollout_T), {}
    low, high = correction.bounds
    match correction.method:
        case "truncated":
            return truncated_weights(proximal_T, rollout_T, cap=correction.cap, denominator=denominator)
        case "decoupled":
            return masked_weights(proximal_T, rollout_T, low=0.0, high=correction.cap, denominator=denominator)
        case "masked":
            return masked_weights(proximal_T, rollout_T, low=low, high=high, denominator=denominator)
        case "sequence_masked":
            return sequence_masked_weights(
                proximal_T,
                rollout_T,
                columns.offsets,
                low=low,
                high=high,
                cap=correction.cap,
                denominator=denominator,
            )


def _credit(
    columns: CreditColumns, advantages_T: Tensor, returns_T: Tensor | None, weights_T: Tensor
) -> pa.RecordBatch:
    def per_token(numbers_T: Tensor) -> pa.ListArray:
        return list_array(numbers_T.float(), columns.offsets)

    credit = {
        "sample_id": pa.array(columns.sample_ids_N.numpy()),
        "advantages": per_token(advantages_T),
        "behaviour_logprobs": per_token(columns.behaviour_logprobs_T),
        "loss_weights": per_token(weights_T),
    }
    if returns_T is None:
        return make_batch(CREDIT, credit)
    return make_batch(CREDIT_WITH_RETURNS, credit | {"returns": per_token(returns_T)})


def _metrics(
    columns: CreditColumns, total: Total, rewards_T: Tensor, advantages_T: Tensor, returns_T: Tensor | None
) -> dict[str, float]:
    lengths_N, combined_N = columns.offsets.diff().double(), total.terms[COMBINED]
    num_samples = len(lengths_N)
    metrics = {
        "score": combined_N.mean(),
        "score_std": combined_N.std(correction=0),
        "shaped_score": total.scores_N.mean(),
        "reward": rewards_T.sum() / num_samples,
        "response_tokens": lengths_N.mean(),
        "response_tokens_max": lengths_N.max(),
        "truncated_fraction": (~columns.finished_N).double().mean(),
        "advantage": advantages_T.mean(),
        "advantage_std": advantages_T.std(correction=0),
        "staleness_mean": columns.staleness_T.double().mean(),
        "staleness_max": columns.staleness_T.max(),
    }
    if len(columns.turn_offsets) > len(columns.offsets):
        metrics |= {"turns": torch.tensor((len(columns.turn_offsets) - 1) / num_samples)}
    if columns.ref_logprobs_T is not None:
        kl_T = k1(columns.behaviour_logprobs_T, columns.ref_logprobs_T)
        metrics |= {"kl_per_sample": kl_T.sum() / num_samples, "kl_per_token": kl_T.mean()}
    if columns.values_T is not None and returns_T is not None:
        metrics |= {
            "value": columns.values_T.mean(),
            "return": returns_T.mean(),
            "explained_variance": explained_variance(columns.values_T, returns_T),
        }
    if columns.baseline_scores_N is not None:
        metrics |= {"baseline_score": columns.baseline_scores_N.mean()}
    if len(set(columns.prompt_ids_N.tolist())) < num_samples:
        without_N = groups_without_signal(combined_N, columns.prompt_ids_N)
        metrics |= {"no_signal_fraction": without_N.double().mean()}
    if columns.policy_logprobs_T is not None:
        gap_T = (columns.policy_logprobs_T - columns.rollout_logprobs_T).abs()
        metrics |= {"engine_logprob_gap": gap_T.mean(), "engine_logprob_gap_max": gap_T.max()}
    return {f"experience/{name}": float(value) for name, value in metrics.items()}
