"""What goes with a policy loss: weights that choose its normalisation, and terms that are added to it.

Legend: T response tokens of a micro-batch, laid end to end, the policy's own only; ``offsets`` (N+1,) int64 are where
its samples begin and end.

Invariants:

- A term is ``sum(weights_T * term_T) / denominator``, where the denominator is the response tokens of the whole
  minibatch, whatever the normalisation: that is in the weights, whose mean over the minibatch is 1 (constant length
  apart). So weights of a correction multiply into them, and every metric stays a plain mean over tokens.
- Adding up micro-batches and ranks gives the term of the minibatch; each sample must be whole.
- A micro-batch of nothing gives a term of 0 and a gradient of 0.
- A token of weight 0 adds nothing to the term, also where its term is infinite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from algorithms.errors import AlgorithmError
from algorithms.losses import Loss, next_token_loss
from algorithms.packed import spread
from algorithms.shapes import require_offsets, require_positive, require_same_length

#: Nats. exp overflows float32 above 88, and 0 times infinity is NaN, in the loss or in its gradient; a ratio of 5e8
#: is no less out of bounds.
MAX_LOG_RATIO = 20.0


def token_mean_weights(like_T: Tensor) -> Tensor:
    """1 for every token, (T,): the loss is the mean over the minibatch's tokens (DAPO; Yu et al. 2025, section 3.3)."""
    return torch.ones_like(like_T)


def sequence_mean_weights(like_T: Tensor, offsets: Tensor, *, num_tokens: int, num_samples: int) -> Tensor:
    """``(num_tokens / num_samples) / length`` of the token's sample, (T,): the mean of the samples' means (GRPO).

    Over a denominator of ``num_tokens`` that is ``1 / (num_samples * length)`` for each token.

    Args:
        like_T: gives precision and device.
        num_tokens, num_samples: of the whole minibatch.

    Raises:
        AlgorithmError: the offsets do not cover the tokens, or the minibatch has no samples.
    """
    require_offsets(offsets, len(like_T))
    require_positive(num_samples)
    lengths_N = offsets.diff().to(like_T.detach())
    return spread((num_tokens / num_samples) / lengths_N, offsets)


def constant_length_weights(like_T: Tensor, *, num_tokens: int, num_samples: int, max_tokens: int) -> Tensor:
    """``num_tokens / (num_samples * max_tokens)`` for every token, (T,): Dr. GRPO (Liu et al. 2025).

    Over a denominator of ``num_tokens`` a token counts ``1 / (num_samples * max_tokens)``, however long its response
    is and however long the others are, where ``max_tokens`` is the longest response that generation allows.

    Raises:
        AlgorithmError: the minibatch has no samples, or the longest response no tokens.
    """
    require_positive(num_samples * max_tokens)
    return torch.full_like(like_T, num_tokens / (num_samples * max_tokens))


def weighted_mean(term_T: Tensor, weights_T: Tensor, denominator: float) -> Tensor:
    """``sum(weights * term) / denominator``, a scalar; a token of weight 0 adds 0, whatever its term is.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    require_same_length(term=term_T, weights=weights_T)
    require_positive(denominator)
    weights_T = weights_T.detach()
    return (term_T.where(weights_T != 0, 0) * weights_T).sum() / denominator


def entropy_bonus(entropy_T: Tensor, *, coefficient: float, weights_T: Tensor, denominator: float) -> Loss:
    """``-coefficient * mean entropy``, to be added to a loss that is minimised.

    Metrics: ``entropy``, in nats a token.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    loss = -coefficient * weighted_mean(entropy_T, weights_T, denominator)
    return loss, {"entropy": entropy_T.detach().sum() / denominator}


def kl_term(
    policy_logprobs_T: Tensor,
    ref_logprobs_T: Tensor,
    estimator: Callable[[Tensor, Tensor], Tensor],
    *,
    coefficient: float,
    weights_T: Tensor,
    denominator: float,
) -> Loss:
    """``coefficient * mean of the estimated KL(policy, reference)``, in the loss and not in the reward.

    For tokens that the policy drew itself the gradients are, in expectation: of k2, and of k1 as it is in a loss
    (``kl.k1_with_gradient``), that of KL(policy, reference), of k3 that of KL(reference, policy). GRPO takes k3 (Shao
    et al. 2024, equation 4). Where the reference gives a token more than 20 nats above the policy, 20 are counted: k3
    would overflow.

    Metrics: ``ref_kl``, the estimate, in nats a token.

    Args:
        estimator: one of ``kl.LOSS_ESTIMATORS``.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    require_same_length(policy=policy_logprobs_T, ref=ref_logprobs_T)
    near_T = torch.minimum(ref_logprobs_T.detach(), policy_logprobs_T.detach() + MAX_LOG_RATIO)
    kl_T = estimator(policy_logprobs_T, near_T)
    loss = coefficient * weighted_mean(kl_T, weights_T, denominator)
    return loss, {"ref_kl": kl_T.detach().sum() / denominator}


def pretraining_term(logprobs_T: Tensor, mask_T: Tensor, *, coefficient: float, denominator: float) -> Loss:
    """PPO-ptx: ``coefficient * mean nats of a pre-training token`` (Ouyang et al. 2022, equation 2, sign turned).

    The mixed objective of one optimizer step is ``L_policy / policy tokens + coefficient * L_pretraining /
    pre-training tokens``: both are means over the tokens of their own minibatch, over all ranks. So the coefficient
    means the same whatever the ratio of data is (InstructGPT: 8 pre-training examples an episode), and gradients of
    both are accumulated before the step, in any order and any cut. The paper's 27.8 is of a normalisation that it
    does not state; take it as a place to start from.

    Metrics: ``pretraining_nats_per_token``.

    Args:
        mask_T: as in ``next_token_loss``.
        denominator: learnt pre-training tokens of the global batch of this optimizer step.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    loss, metrics = next_token_loss(logprobs_T, mask_T, denominator)
    return coefficient * loss, {"pretraining_nats_per_token": metrics["nats_per_token"]}


def add_terms(*terms: Loss) -> Loss:
    """The sum of the losses, and all their metrics.

    Raises:
        AlgorithmError: there are no terms, or two of them have a metric of one name.
    """
    if not terms:
        raise AlgorithmError("a loss has at least one term, got none")
    metrics: dict[str, Tensor] = {}
    for _, measured in terms:
        if twice := metrics.keys() & measured.keys():
            raise AlgorithmError(f"two terms of a loss have a metric {sorted(twice)[0]!r}; each name must be of one")
        metrics |= measured
    loss = terms[0][0]
    for further, _ in terms[1:]:
        loss = loss + further
    return loss, metrics
