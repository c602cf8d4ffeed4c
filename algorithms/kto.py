"""Kahneman-Tversky optimisation: learning from responses judged good or bad, each on its own (Ethayarajh et al. 2024).

Legend: N responses; a log-prob is the sum over a response's tokens (``preferences.sequence_logprobs``), in nats.

The invariants are those of ``algorithms.preferences``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.errors import AlgorithmError
from algorithms.kl import k1
from algorithms.losses import Loss
from algorithms.ranking import wins
from algorithms.shapes import require_positive, require_same_length


def kto_baseline(policy_N: Tensor, ref_N: Tensor, *, denominator: float) -> Tensor:
    """``sum (policy - reference) / denominator`` of responses to *other* prompts, a scalar without a gradient.

    The paper's estimate of KL(policy, reference): each prompt of a batch with the response of the next. Parts of the
    global batch add up; ``kto_loss`` takes the sum, and only that is to be cut off below 0.

    Args:
        policy_N: log-prob of a mismatched response under the policy.
        denominator: mismatched responses of the global batch.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    require_same_length(policy=policy_N, ref=ref_N)
    require_positive(denominator)
    return k1(policy_N.detach(), ref_N.detach()).sum() / denominator


def kto_loss(
    policy_N: Tensor,
    ref_N: Tensor,
    desirable_N: Tensor,
    baseline: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    num_desirable: int,
    denominator: float,
) -> Loss:
    """``sum w_y (1 - sigmoid(+-beta (log ratio - z))) / denominator``: + for the desirable, - for the others.

    z is the baseline, cut off below 0: gain and loss are felt from there. While policy and reference are equal each
    response costs half its weight. Where log ratios lie far from z, on either side, the gradient vanishes.

    Metrics: ``chosen_reward`` and ``chosen_logprob``, means over the desirable, and ``rejected_reward`` and
    ``rejected_logprob``, over the others; each only where the global batch has any. A reward is beta times the log
    ratio. Means over all: ``reward_accuracy``, where it lies on its side of the baseline's, on it counting half;
    ``ref_kl``, reference less policy; ``kl_baseline``, z.

    Args:
        desirable_N: bool.
        baseline: of the whole global batch, the same for each part; no gradient flows back.
        beta: above 0.
        desirable_weight: the paper asks that the weights times the numbers of responses of the two kinds stay between
            1 : 1 and 4 : 3.
        num_desirable: of the global batch, where ``chosen_reward`` is a mean over them.
        denominator: responses of the global batch.

    Raises:
        AlgorithmError: lengths differ, beta or the denominator is not positive, the baseline is no scalar, or there
            are more desirable responses than responses.
    """
    require_same_length(policy=policy_N, ref=ref_N, desirable=desirable_N)
    require_positive(denominator)
    if not beta > 0:
        raise AlgorithmError(f"beta {beta}; it must be above 0")
    if not 0 <= num_desirable <= denominator:
        raise AlgorithmError(f"{num_desirable} of {denominator} responses of the global batch are desirable")
    reference_point = torch.as_tensor(baseline, dtype=policy_N.dtype, device=policy_N.device).detach().clamp(min=0)
    if reference_point.dim():
        raise AlgorithmError(f"the baseline is one number of the batch, got shape {tuple(reference_point.shape)}")
    desirable_N = desirable_N.bool()
    log_ratios_N = policy_N - ref_N.detach()
    gains_N = beta * (log_ratios_N - reference_point)
    gains_N = gains_N.where(desirable_N, -gains_N)
    weights_N = torch.full_like(gains_N, undesirable_weight).masked_fill(desirable_N, desirable_weight)
    # sigmoid(-x) for 1 - sigmoid(x), which would round to 0.
    loss = (weights_N * (-gains_N).sigmoid()).sum() / denominator
    with torch.no_grad():
        metrics = {
            "reward_accuracy": wins(gains_N).sum() / denominator,
            "ref_kl": -log_ratios_N.sum() / denominator,
            "kl_baseline": reference_point * len(policy_N) / denominator,
        }
        for name, mask_N, count in (
            ("chosen", desirable_N, num_desirable),
            ("rejected", ~desirable_N, denominator - num_desirable),
        ):
            if count > 0:
                metrics[f"{name}_reward"] = beta * log_ratios_N.where(mask_N, 0).sum() / count
                metrics[f"{name}_logprob"] = policy_N.where(mask_N, 0).sum() / count
    return loss, metrics
