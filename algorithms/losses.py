"""Losses: tensors in, ``(loss, metrics)`` out.

Legend: T response tokens of a micro-batch, laid end to end; N pairs.

Invariants:

- A loss is a sum over what it is given, divided by a ``denominator`` that the caller counts over the whole global
  batch. Adding up micro-batches and ranks gives the loss of the batch, however it was cut.
- So is every metric.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Loss = tuple[Tensor, dict[str, Tensor]]


def next_token_loss(logprobs_T: Tensor, mask_T: Tensor, denominator: float) -> Loss:
    """Cross-entropy in nats: ``-sum mask * logprobs / denominator``. ``denominator``: learnt tokens of the batch."""
    loss = -(logprobs_T * mask_T).sum() / denominator
    return loss, {"nats_per_token": loss.detach()}


def clipped_policy_loss(
    policy_logprobs_T: Tensor,
    behaviour_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_ratio: float,
    denominator: float,
    entropy_T: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> Loss:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), to be minimised, less an entropy bonus.

    ``sum max(-A r, -A clip(r, 1 - c, 1 + c)) / denominator`` with ``r = exp(policy - behaviour)``.

    Metrics: ``ratio`` its mean; ``clip_fraction`` where the clipped term was larger and the gradient is 0;
    ``approx_kl`` the mean of ``(r - 1) - log r``, the KL from behaviour to policy; ``entropy``.

    Args:
        behaviour_logprobs_T: of the policy that drew the tokens; no gradient flows into it.
        denominator: response tokens of the whole minibatch.
    """
    log_ratio = policy_logprobs_T - behaviour_logprobs_T.detach()
    ratio = log_ratio.exp()
    plain = -advantages_T * ratio
    clipped = -advantages_T * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    policy_loss = torch.maximum(plain, clipped).sum() / denominator
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "ratio": ratio.sum() / denominator,
            "clip_fraction": (clipped > plain).sum() / denominator,
            "approx_kl": (ratio - 1 - log_ratio).sum() / denominator,
        }
    if entropy_T is None:
        return policy_loss, metrics
    mean_entropy = entropy_T.sum() / denominator
    loss = policy_loss - entropy_coefficient * mean_entropy if entropy_coefficient else policy_loss
    return loss, {**metrics, "entropy": mean_entropy.detach()}


def clipped_value_loss(
    values_T: Tensor,
    rollout_values_T: Tensor,
    returns_T: Tensor,
    *,
    clip_value: float | None,
    denominator: float,
) -> Loss:
    """Half the squared error of the values, the larger of plain and clipped.

    ``sum 0.5 max((V - R)^2, (clip(V, V_rollout - c, V_rollout + c) - R)^2) / denominator``
    (Stiennon et al. 2020 and the PPO code before it).

    Metrics: ``value_loss``; ``value_clip_fraction`` where the clipped error was larger; ``value`` its mean.
    """
    error = (values_T - returns_T).square()
    if clip_value is None:
        clipped_error = error
    else:
        near = rollout_values_T + (values_T - rollout_values_T).clamp(-clip_value, clip_value)
        clipped_error = (near - returns_T).square()
    loss = 0.5 * torch.maximum(error, clipped_error).sum() / denominator
    with torch.no_grad():
        metrics = {
            "value_loss": loss.detach(),
            "value_clip_fraction": (clipped_error > error).sum() / denominator,
            "value": values_T.sum() / denominator,
        }
    return loss, metrics


def pairwise_loss(chosen_scores_N: Tensor, rejected_scores_N: Tensor, *, denominator: float) -> Loss:
    """Bradley-Terry: ``-sum log sigmoid(chosen - rejected) / denominator`` (Ouyang et al. 2022, equation 1, K = 2).

    Metrics: ``accuracy``, a tie counting half; ``margin`` the mean of ``chosen - rejected``; ``score``.
    """
    margin = chosen_scores_N - rejected_scores_N
    loss = -logsigmoid(margin).sum() / denominator
    with torch.no_grad():
        metrics = {
            "accuracy": ((margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)).sum() / denominator,
            "margin": margin.sum() / denominator,
            "score": (chosen_scores_N + rejected_scores_N).sum() / (2 * denominator),
        }
    return loss, metrics
