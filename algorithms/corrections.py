"""Weights for tokens that were drawn by another policy than the one in training: other arithmetic, or old weights.

Legend: T response tokens of a micro-batch, laid end to end; ``offsets`` (N+1,) int64 are where its samples begin and
end; k = exp(proximal - rollout).

``rollout_logprobs_T`` are the engine's, of the version that drew each token. ``proximal_logprobs_T`` are what the
trainer recomputes before the first update of an iteration: they differ from the engine's by arithmetic (k measures
the mismatch) and, where tokens are stale, by the versions between (k measures both).

Each gives ``(weights_T, metrics)``. The weights are numbers: no gradient flows through them. Multiply them into the
``weights_T`` of a policy loss whose ratio is against the proximal log-probs (or that has no ratio). ``denominator`` is
the response tokens of the whole minibatch; metrics are sums over it and add up over micro-batches and ranks:

- ``correction_fraction`` of tokens that were touched: truncated, or masked;
- ``correction_weight``, the mean weight; where k is neither cut nor masked its expectation is 1;
- ``correction_kl``, the mean of ``(k - 1) - log k``: k3 of KL(rollout, proximal).

All raise AlgorithmError where lengths differ, the denominator is not positive or a bound makes no sense. A log-prob
of NaN gives a weight of NaN: it is not taken for one that is out of bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.errors import AlgorithmError
from algorithms.loss_terms import MAX_LOG_RATIO, add_terms
from algorithms.losses import Loss
from algorithms.packed import sample_means, spread
from algorithms.policy_losses import clip_higher_loss
from algorithms.shapes import require_positive, require_same_length

Weights = tuple[Tensor, dict[str, Tensor]]


def truncated_weights(
    proximal_logprobs_T: Tensor, rollout_logprobs_T: Tensor, *, cap: float, denominator: float
) -> Weights:
    """``min(k, cap)``: truncated importance sampling (TIS; Ionides 2008, for this use Yao et al. 2025).

    Biased where it truncates, and of bounded variance. ``cap`` of 2 is usual.
    """
    log_k_T = _log_ratio(proximal_logprobs_T, rollout_logprobs_T)
    if not cap > 0:
        raise AlgorithmError(f"weights are truncated at {cap}; a cap is above 0")
    k_T = log_k_T.exp()
    return _weights(k_T.clamp(max=cap), k_T > cap, log_k_T, denominator)


def masked_weights(
    proximal_logprobs_T: Tensor, rollout_logprobs_T: Tensor, *, low: float, high: float, denominator: float
) -> Weights:
    """``k`` where ``low <= k <= high``, else 0 (IcePop; Ling team 2025, with 0.5 and 5).

    A token whose k is far off tells of broken arithmetic rather than of the policy, and is left out.
    """
    log_k_T = _log_ratio(proximal_logprobs_T, rollout_logprobs_T)
    outside_T = _outside(k_T := log_k_T.exp(), low, high)
    return _weights(k_T.masked_fill(outside_T, 0), outside_T, log_k_T, denominator)


def sequence_masked_weights(
    proximal_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    offsets: Tensor,
    *,
    low: float,
    high: float,
    cap: float,
    denominator: float,
) -> Weights:
    """``min(k, cap)``, or 0 on every token of a sample whose geometric mean of k is outside of ``[low, high]``.

    (Geometric sequence masking: Liu, Li et al. 2025; with truncated weights of tokens it is verl's Geo-RS-Token-TIS,
    by default with 0.999, 1.001 and a cap of 2.) The mean, not the product: that would drop long samples for their
    length. Deviations in both directions cancel within a sample, so its mean is far nearer to 1 than a token's k is,
    about ``s / sqrt(tokens)`` for a standard deviation of s, and bounds for tokens would never mask a sample.
    """
    log_k_T = _log_ratio(proximal_logprobs_T, rollout_logprobs_T)
    if not cap > 0:
        raise AlgorithmError(f"weights are truncated at {cap}; a cap is above 0")
    k_T = log_k_T.exp()
    # Of the log ratios as they are: a single token cut at MAX_LOG_RATIO would move the mean.
    means_N = sample_means((proximal_logprobs_T - rollout_logprobs_T).detach(), offsets)
    outside_T = spread(_outside(means_N.exp(), low, high), offsets)
    kept_T = k_T.clamp(max=cap).masked_fill(spread(means_N.isnan(), offsets), torch.nan)
    return _weights(kept_T.masked_fill(outside_T, 0), outside_T | (k_T > cap), log_k_T, denominator)


def decoupled_policy_loss(
    policy_logprobs_T: Tensor,
    proximal_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    cap: float,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """``k max(-A u, -A clip(u, 1 - clip_low, 1 + clip_high))``, u = exp(policy - proximal): decoupled PPO.

    (Hilton et al. 2021; for stale tokens Fu et al. 2025, AReaL.) The clip keeps the policy near what it
    was when the iteration's training began, and not near an old version that is worse; k, a number, corrects for who
    drew the token. Tokens with k above ``cap`` are left out, as in AReaL's code (5); to truncate them instead, give
    ``truncated_weights`` to ``clip_higher_loss``.

    Metrics: those of ``clip_higher_loss``, ratio and KL against the proximal policy, and of ``masked_weights``.
    """
    correction_T, corrected = masked_weights(
        proximal_logprobs_T, rollout_logprobs_T, low=0.0, high=cap, denominator=denominator
    )
    require_same_length(policy=policy_logprobs_T, correction=correction_T, weights=weights_T)
    loss, metrics = clip_higher_loss(
        policy_logprobs_T,
        proximal_logprobs_T,
        advantages_T,
        clip_low=clip_low,
        clip_high=clip_high,
        weights_T=weights_T * correction_T,
        denominator=denominator,
    )
    return add_terms((loss, metrics), (torch.zeros_like(loss), corrected))


def _log_ratio(proximal_logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> Tensor:
    require_same_length(proximal_logprobs=proximal_logprobs_T, rollout_logprobs=rollout_logprobs_T)
    return (proximal_logprobs_T - rollout_logprobs_T).detach().clamp(max=MAX_LOG_RATIO)


def _outside(k: Tensor, low: float, high: float) -> Tensor:
    if not 0 <= low < high:
        raise AlgorithmError(f"ratios from {low} to {high} are kept; the bounds must rise, from 0 or more")
    return (k < low) | (k > high)


def _weights(weights_T: Tensor, touched_T: Tensor, log_k_T: Tensor, denominator: float) -> Weights:
    require_positive(denominator)
    return weights_T, {
        "correction_fraction": touched_T.to(weights_T).sum() / denominator,
        "correction_weight": weights_T.sum() / denominator,
        "correction_kl": (log_k_T.expm1() - log_k_T).sum() / denominator,
    }
