"""Policy losses, one function each, to be minimised: log-probs and advantages in, ``(loss, metrics)`` out.

Legend: T response tokens of a micro-batch, laid end to end, the policy's own only; N whole samples; ``offsets``
(N+1,) int64 are where samples begin and end; A an advantage, r a ratio.

All take ``policy_logprobs_T``, ``behaviour_logprobs_T`` (what the ratio divides by), ``advantages_T``, ``weights_T``
(how the loss is normalised, times the weights of a correction, if any: see ``loss_terms``) and ``denominator``
(response tokens of the whole minibatch). All give the metrics ``policy_loss``, ``ratio`` (mean of what the loss
multiplies with before any clip), ``clip_fraction_low`` and ``clip_fraction_high`` (of tokens, where the lower and
the upper bound took effect) and ``approx_kl`` (mean of ``(r - 1) - log r`` of tokens: k3 of KL(behaviour, policy)).
All raise AlgorithmError where lengths differ, the denominator is not positive or a bound makes no sense.

Invariants: those of ``losses`` and ``loss_terms``; and

- Metrics are means over all tokens, whatever their weights.
- Gradients flow into ``policy_logprobs_T`` alone.
- A log ratio above 20 nats counts as 20 (MAX_LOG_RATIO): nothing overflows, and nothing is NaN where A is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.errors import AlgorithmError
from algorithms.loss_terms import MAX_LOG_RATIO, weighted_mean
from algorithms.losses import Loss
from algorithms.packed import sample_means, spread
from algorithms.shapes import require_positive, require_same_length


def clip_higher_loss(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``: PPO's, with bounds apart (Yu et al. 2025, DAPO, eq. 10).

    With equal bounds it is ``losses.clipped_policy_loss``. A fraction is of tokens that have no gradient: low where
    A < 0 and r < 1 - clip_low, high where A > 0 and r > 1 + clip_high. DAPO: 0.2 and 0.28.
    """
    log_ratio_T = _log_ratio(policy_logprobs_T, behaviour_logprobs_T, advantages_T)
    loss_T, low_T, high_T = _clipped(log_ratio_T, advantages_T, clip_low, clip_high)
    loss = weighted_mean(loss_T, weights_T, denominator)
    return loss, _metrics(loss, log_ratio_T, log_ratio_T, low_T, high_T, denominator)


def dual_clip_loss(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float = 3.0,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """``clip_higher_loss``, which for A < 0 is at most ``-clip_dual A`` (Ye et al. 2020, c = 3).

    Without it a token of A < 0 whose ratio has grown without bound pulls without bound. Another metric is
    ``clip_fraction_dual``, of tokens that the second bound left without gradient: A < 0 and r > clip_dual.
    """
    if not clip_dual > 1:
        raise AlgorithmError(f"clip_dual is {clip_dual}; it is a ratio above 1")
    log_ratio_T = _log_ratio(policy_logprobs_T, behaviour_logprobs_T, advantages_T)
    single_T, low_T, high_T = _clipped(log_ratio_T, advantages_T, clip_low, clip_high)
    most_T = -clip_dual * advantages_T.detach()
    dual_T = (most_T > 0) & (single_T > most_T)
    loss = weighted_mean(most_T.where(dual_T, single_T), weights_T, denominator)
    metrics = _metrics(loss, log_ratio_T, log_ratio_T, low_T, high_T, denominator)
    return loss, {**metrics, "clip_fraction_dual": dual_T.to(loss).sum() / denominator}


def gspo_loss(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    offsets: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """``max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))``, s = exp(mean of the sample's log ratios) (GSPO).

    (Zheng et al. 2025.) The paper's objective has one advantage a sample, and is the mean over
    samples: ``sequence_mean_weights``. Every token of a sample is clipped, or none. ``ratio`` is of s. The paper's
    bounds are 3e-4 and 4e-4: s is a mean, and stays far closer to 1 than a token's ratio.
    """
    tokens_T = _log_ratio(policy_logprobs_T, behaviour_logprobs_T, advantages_T)
    sequence_T = _sequence_log_ratio(policy_logprobs_T, behaviour_logprobs_T, offsets)
    loss_T, low_T, high_T = _clipped(sequence_T, advantages_T, clip_low, clip_high)
    loss = weighted_mean(loss_T, weights_T, denominator)
    return loss, _metrics(loss, sequence_T, tokens_T, low_T, high_T, denominator)


def gspo_token_loss(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    offsets: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """GSPO's ratio in value, with the gradient of the token's own log-prob: for advantages that differ in a sample.

    ``s_t = sg(s) p_t / sg(p_t)`` in the place of s, sg being a stop of gradients (Zheng et al. 2025, GSPO-token).
    Where a sample's advantages and weights are equal, loss and gradient are those of ``gspo_loss``.
    """
    tokens_T = _log_ratio(policy_logprobs_T, behaviour_logprobs_T, advantages_T)
    sequence_T = _sequence_log_ratio(policy_logprobs_T, behaviour_logprobs_T, offsets).detach()
    own_T = sequence_T + (policy_logprobs_T - policy_logprobs_T.detach())
    loss_T, low_T, high_T = _clipped(own_T, advantages_T, clip_low, clip_high)
    loss = weighted_mean(loss_T, weights_T, denominator)
    return loss, _metrics(loss, sequence_T, tokens_T, low_T, high_T, denominator)


def cispo_loss(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """``-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p``, sg being a stop of gradients (CISPO).

    (MiniMax 2025, MiniMax-M1, equations 4 and 5.) What is clipped is the weight: no token loses its gradient.
    Fractions are of tokens whose weight was clipped, of either sign of A. The paper has no lower bound in effect:
    ``clip_low`` of 1.
    """
    log_ratio_T = _log_ratio(policy_logprobs_T, behaviour_logprobs_T, advantages_T).detach()
    _require_bounds(clip_low, clip_high)
    ratio_T = log_ratio_T.exp()
    loss_T = -ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T.detach() * policy_logprobs_T
    loss = weighted_mean(loss_T, weights_T, denominator)
    low_T, high_T = ratio_T < 1 - clip_low, ratio_T > 1 + clip_high
    return loss, _metrics(loss, log_ratio_T, log_ratio_T, low_T, high_T, denominator)


def reinforce_loss(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """``-A log p`` (Williams 1992): the plain policy gradient, with no ratio.

    Right on policy only: for a first update, or with the weights of ``corrections``. The behaviour's log-probs are
    measured against and enter no gradient. Nothing is clipped, and both fractions are 0.
    """
    log_ratio_T = _log_ratio(policy_logprobs_T, behaviour_logprobs_T, advantages_T).detach()
    loss = weighted_mean(-advantages_T.detach() * policy_logprobs_T, weights_T, denominator)
    none_T = torch.zeros_like(log_ratio_T, dtype=torch.bool)
    return loss, _metrics(loss, log_ratio_T, log_ratio_T, none_T, none_T, denominator)


def _log_ratio(policy_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, advantages_T: Tensor) -> Tensor:
    require_same_length(policy=policy_logprobs_T, behaviour=behaviour_logprobs_T, advantages=advantages_T)
    return (policy_logprobs_T - behaviour_logprobs_T.detach()).clamp(max=MAX_LOG_RATIO)


def _sequence_log_ratio(policy_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, offsets: Tensor) -> Tensor:
    """The mean log ratio of the token's sample, (T,)."""
    means_N = sample_means(policy_logprobs_T - behaviour_logprobs_T.detach(), offsets)
    return spread(means_N.clamp(max=MAX_LOG_RATIO), offsets)


def _clipped(
    log_ratio_T: Tensor, advantages_T: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate of each token, and where the lower and the upper bound took its gradient."""
    _require_bounds(clip_low, clip_high)
    advantages_T = advantages_T.detach()
    ratio_T = log_ratio_T.exp()
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - clip_low, 1 + clip_high)
    cut_T = clipped_T > plain_T
    return torch.maximum(plain_T, clipped_T), cut_T & (ratio_T < 1), cut_T & (ratio_T > 1)


def _require_bounds(clip_low: float, clip_high: float) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise AlgorithmError(f"ratios are clipped to 1 - {clip_low} and 1 + {clip_high}; both must be 0 or more")


def _metrics(
    loss: Tensor, log_ratio_T: Tensor, token_log_ratio_T: Tensor, low_T: Tensor, high_T: Tensor, denominator: float
) -> dict[str, Tensor]:
    require_positive(denominator)
    with torch.no_grad():
        return {
            "policy_loss": loss.detach(),
            "ratio": log_ratio_T.exp().sum() / denominator,
            "clip_fraction_low": low_T.to(loss).sum() / denominator,
            "clip_fraction_high": high_T.to(loss).sum() / denominator,
            "approx_kl": (token_log_ratio_T.expm1() - token_log_ratio_T).sum() / denominator,
        }
