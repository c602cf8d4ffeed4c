"""Losses: tensors in, ``(loss, metrics)`` out.

Legend: T response tokens of a micro-batch, laid end to end. Losses of reward models are in ``algorithms.ranking``, of
pairs under a policy in ``algorithms.preferences``.

Invariants:

- A loss is a sum over what it is given, divided by a ``denominator`` that the caller counts over the whole global
  batch. Adding up micro-batches and ranks gives the loss of the batch, however it was cut.
- So is every metric.
- A micro-batch of nothing gives a loss of 0 and a gradient of 0, so that a rank without work can still take part.
- Gradients flow into what the model gives (first argument, entropy) and into nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.errors import AlgorithmError
from algorithms.kl import k3
from algorithms.shapes import require_positive, require_same_length

Loss = tuple[Tensor, dict[str, Tensor]]


def next_token_loss(logprobs_T: Tensor, mask_T: Tensor, denominator: float) -> Loss:
    """Cross-entropy in nats: minus the sum of the log-probs where ``mask`` is not 0, over ``denominator``.

    Metrics: ``nats_per_token``.

    Args:
        mask_T: bool or 0 and 1. What is masked may be anything, also infinite.
        denominator: learnt tokens of the global batch.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    require_same_length(logprobs=logprobs_T, mask=mask_T)
    require_positive(denominator)
    loss = -logprobs_T.where(mask_T != 0, 0).sum() / denominator
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
    ``approx_kl`` the mean of ``(r - 1) - log r``: k3 of KL(behaviour, policy); ``entropy``, where it is given.

    Args:
        behaviour_logprobs_T: of the policy that drew the tokens.
        clip_ratio: c, from 0.
        denominator: response tokens of the whole minibatch.
        entropy_T: without it ``entropy_coefficient`` must be 0.

    Raises:
        AlgorithmError: lengths differ, the denominator is not positive, or a bonus is asked of no entropy.
    """
    require_same_length(policy=policy_logprobs_T, behaviour=behaviour_logprobs_T, advantages=advantages_T)
    require_positive(denominator)
    advantages_T = advantages_T.detach()
    log_ratio = policy_logprobs_T - behaviour_logprobs_T.detach()
    ratio = log_ratio.exp()
    plain = -advantages_T * ratio
    clipped = -advantages_T * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    policy_loss = torch.maximum(plain, clipped).sum() / denominator
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "ratio": ratio.sum() / denominator,
            "clip_fraction": (clipped > plain).to(ratio).sum() / denominator,
            "approx_kl": k3(behaviour_logprobs_T, policy_logprobs_T).sum() / denominator,
        }
    if entropy_T is None:
        if entropy_coefficient:
            raise AlgorithmError(f"entropy_coefficient is {entropy_coefficient}, but no entropy was given")
        return policy_loss, metrics
    require_same_length(policy=policy_logprobs_T, entropy=entropy_T)
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
    (``vf_loss`` of lm-human-preferences and of OpenAI's baselines before it).

    Metrics: ``value_loss``; ``value_clip_fraction`` where the clipped error was larger; ``value`` its mean.

    Args:
        rollout_values_T: what the critic said before the iteration's first update.
        clip_value: c; none takes the plain error.
        denominator: response tokens of the whole minibatch.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    require_same_length(values=values_T, rollout_values=rollout_values_T, returns=returns_T)
    require_positive(denominator)
    rollout_values_T, returns_T = rollout_values_T.detach(), returns_T.detach()
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
            "value_clip_fraction": (clipped_error > error).to(error).sum() / denominator,
            "value": values_T.sum() / denominator,
        }
    return loss, metrics
