"""Losses of a policy on compared or judged responses, without a reward model.

Legend: T response tokens laid end to end; N pairs of a chosen and a rejected response to one prompt, or in the unpaired
losses N responses. A log-prob is of a whole response: the *sum* over its tokens (``sequence_logprobs``), in nats.
``log ratio`` is policy less reference.

Invariants:

- As in ``algorithms.losses``: a loss and each metric are sums over what is given, divided by a ``denominator`` counted
  over the global batch, so micro-batches and ranks add up; nothing gives 0.
- Gradients flow into policy log-probs and into nothing else.
- Losses and gradients are finite for log ratios of any finite size, in float32 too.
- Each log ratio is taken first, and then their difference: the two log-probs of one response are close to each other,
  those of two responses are not. Where policy and reference are equal, margins are exactly 0.

Metrics of all losses over pairs, means: ``chosen_reward`` and ``rejected_reward``, the rewards that the loss implies
(``beta`` times the log ratio, unless it says otherwise); ``reward_margin``, their difference; ``reward_accuracy``,
where the chosen has the higher one, equal ones counting half; ``chosen_logprob`` and ``rejected_logprob`` under the
policy, apart because both may fall while the margin rises. With a reference also ``ref_kl``: reference less policy,
the mean over both responses: k1 of KL(reference, policy) if the reference drew them, else only a distance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.kl import k1
from algorithms.losses import Loss
from algorithms.ranking import soft_cross_entropy, wins
from algorithms.shapes import require_offsets, require_positive, require_same_length


def sequence_logprobs(logprobs_T: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the log-probs of each response, (N,), 0 of an empty one; float32, or float64 where given that.

    Added up in float64, and what a response gets does not depend on those beside it: policy and reference agree to
    the bit where their tokens do, however each was packed.

    >>> sequence_logprobs(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 2, 3]))
    tensor([-3.,  0., -4.])

    Raises:
        ShapeMismatch: offsets do not cover the tokens.
    """
    require_same_length(logprobs=logprobs_T)
    require_offsets(offsets, len(logprobs_T))
    lengths = offsets.diff()
    samples_T = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths)
    exact_T = logprobs_T.double()
    sums_N = exact_T.new_zeros(len(lengths)).index_add(0, samples_T, exact_T)
    return sums_N.to(torch.promote_types(logprobs_T.dtype, torch.float32))


def mean_logprobs(logprobs_N: Tensor, lengths_N: Tensor) -> Tensor:
    """Mean over the tokens of each response, (N,), from sums and numbers of tokens.

    Raises:
        ShapeMismatch: lengths differ, or a response has no token to take a mean of.
    """
    require_same_length(logprobs=logprobs_N, lengths=lengths_N)
    if bool((empty := lengths_N < 1).any()):
        raise ShapeMismatch(f"response {int(empty.nonzero()[0])} of the batch has no token to take a mean of")
    return logprobs_N / lengths_N


def dpo_loss(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    denominator: float,
) -> Loss:
    """Direct preference optimisation: ``-sum log sigmoid(m) / denominator`` (Rafailov et al. 2023, equation 7).

    ``m = beta (log ratio of the chosen - log ratio of the rejected)``. While policy and reference are equal it is ln 2
    a pair.

    Args:
        beta: above 0; how much it costs to leave the reference.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: lengths differ, or beta or the denominator is not positive.
    """
    pairs = _with_reference(policy_chosen_N, policy_rejected_N, ref_chosen_N, ref_rejected_N, beta)
    return _over_pairs(-logsigmoid(pairs.margin_N), pairs, denominator)


def conservative_dpo_loss(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    denominator: float,
) -> Loss:
    """DPO where a share e of the labels is wrong (cDPO; Mitchell, "A note on DPO with noisy preferences", 2023).

    ``-sum ((1 - e) log sigmoid(m) + e log sigmoid(-m)) / denominator``, m as in ``dpo_loss``. It is least at
    ``sigmoid(m) = 1 - e``, so margins stay bounded. e = 0 is ``dpo_loss``.

    Args:
        label_smoothing: e, from 0, below 0.5.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: e is out of range, or as ``dpo_loss``.
    """
    _require_smoothing(label_smoothing)
    pairs = _with_reference(policy_chosen_N, policy_rejected_N, ref_chosen_N, ref_rejected_N, beta)
    return _over_pairs(soft_cross_entropy(pairs.margin_N, 1 - label_smoothing), pairs, denominator)


def robust_dpo_loss(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    denominator: float,
) -> Loss:
    """DPO, unbiased where each label is flipped with probability e (rDPO; Chowdhury et al. 2024).

    ``-sum ((1 - e) log sigmoid(m) - e log sigmoid(-m)) / (1 - 2e) / denominator``, m as in ``dpo_loss``: its mean over
    the flips is the DPO loss of the true label. It may be negative, and falls without end as m grows. e = 0 is
    ``dpo_loss``.

    Args:
        label_smoothing: e, from 0, below 0.5.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: e is out of range, or as ``dpo_loss``.
    """
    _require_smoothing(label_smoothing)
    pairs = _with_reference(policy_chosen_N, policy_rejected_N, ref_chosen_N, ref_rejected_N, beta)
    kept, flipped = -logsigmoid(pairs.margin_N), -logsigmoid(-pairs.margin_N)
    losses_N = ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return _over_pairs(losses_N, pairs, denominator)


def ipo_loss(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    denominator: float,
) -> Loss:
    """``sum (h - 1 / (2 beta))^2 / denominator`` (IPO; Azar et al. 2023, equation 17, where beta is tau).

    h is the difference of the log ratios. It is of *sums* over tokens, as in the paper, not divided by lengths (TRL
    takes means over tokens: there the same beta asks for a far larger h).

    Args:
        beta: above 0. The difference is drawn to ``1 / (2 beta)`` nats.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: as ``dpo_loss``.
    """
    pairs = _with_reference(policy_chosen_N, policy_rejected_N, ref_chosen_N, ref_rejected_N, beta)
    return _over_pairs(((pairs.margin_N - 0.5) / beta).square(), pairs, denominator)


def hinge_loss(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    *,
    beta: float,
    denominator: float,
) -> Loss:
    """``sum max(0, 1 - m) / denominator``, m as in ``dpo_loss``: SLiC's hinge on log ratios (Liu et al. 2024, RSO).

    A pair whose margin has reached 1 has no gradient.

    Args:
        beta: above 0.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: as ``dpo_loss``.
    """
    pairs = _with_reference(policy_chosen_N, policy_rejected_N, ref_chosen_N, ref_rejected_N, beta)
    return _over_pairs(relu(1 - pairs.margin_N), pairs, denominator)


def slic_loss(policy_chosen_N: Tensor, policy_rejected_N: Tensor, *, margin: float, denominator: float) -> Loss:
    """``sum max(0, margin - log pi(chosen) + log pi(rejected)) / denominator`` (SLiC-HF; Zhao et al. 2023).

    No reference: the paper holds the policy by a cross-entropy beside it (``nll_term``). Rewards are log-probs.

    Args:
        margin: from 0, in nats.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: the margin is negative, lengths differ, or the denominator is not positive.
    """
    if not margin >= 0:
        raise AlgorithmError(f"margin {margin}; it must be 0 or more nats")
    pairs = _without_reference(policy_chosen_N, policy_rejected_N, policy_chosen_N, policy_rejected_N)
    return _over_pairs(relu(margin - pairs.margin_N), pairs, denominator)


def reference_free_dpo_loss(
    policy_chosen_N: Tensor, policy_rejected_N: Tensor, *, beta: float, denominator: float
) -> Loss:
    """``dpo_loss`` with a reference to which all responses are alike (``reference_free`` of the DPO authors' code).

    ``-sum log sigmoid(beta (log pi(chosen) - log pi(rejected))) / denominator``. Rewards are beta times log-probs.

    Args:
        beta: above 0.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: as ``dpo_loss``.
    """
    _require_beta(beta)
    pairs = _without_reference(policy_chosen_N, policy_rejected_N, beta * policy_chosen_N, beta * policy_rejected_N)
    return _over_pairs(-logsigmoid(pairs.margin_N), pairs, denominator)


def simpo_loss(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    chosen_lengths_N: Tensor,
    rejected_lengths_N: Tensor,
    *,
    beta: float,
    gamma: float,
    denominator: float,
) -> Loss:
    """``-sum log sigmoid(beta (mean_w - mean_l) - gamma) / denominator`` (SimPO; Meng et al. 2024).

    ``mean`` is that of a response's token log-probs. Rewards are beta times it, and accuracy does not see gamma.

    Args:
        policy_chosen_N: sums, as everywhere; so are the rejected.
        chosen_lengths_N: response tokens, from 1.
        beta: above 0 (the paper: 2 to 10).
        gamma: the target margin, in rewards: beta times the ``gamma_beta_ratio`` of the authors' code.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: a response is empty, or as ``dpo_loss``.
    """
    _require_beta(beta)
    chosen_N = beta * mean_logprobs(policy_chosen_N, chosen_lengths_N)
    rejected_N = beta * mean_logprobs(policy_rejected_N, rejected_lengths_N)
    pairs = _without_reference(policy_chosen_N, policy_rejected_N, chosen_N, rejected_N)
    return _over_pairs(-logsigmoid(pairs.margin_N - gamma), pairs, denominator)


def orpo_loss(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    chosen_lengths_N: Tensor,
    rejected_lengths_N: Tensor,
    *,
    coefficient: float,
    denominator: float,
) -> Loss:
    """``-c sum log sigmoid(log odds_w - log odds_l) / denominator`` (ORPO; Hong et al. 2024, equation 7).

    ``odds = P / (1 - P)`` with P = exp(mean log-prob of the response's tokens). The paper's loss is this plus
    ``nll_term`` of the chosen with coefficient 1. Rewards are the coefficient times the mean log-prob (as in TRL).
    A P nearer to 1 than the next number below it counts as that number, without a gradient: odds stay finite.

    Metrics: also ``log_odds_ratio``, its mean.

    Args:
        policy_chosen_N: sums, as everywhere; so are the rejected.
        chosen_lengths_N: response tokens, from 1.
        coefficient: c, the paper's lambda.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: a response is empty, lengths differ, or the denominator is not positive.
    """
    chosen_N = mean_logprobs(policy_chosen_N, chosen_lengths_N)
    rejected_N = mean_logprobs(policy_rejected_N, rejected_lengths_N)
    pairs = _without_reference(policy_chosen_N, policy_rejected_N, coefficient * chosen_N, coefficient * rejected_N)
    log_odds_ratio_N = _log_odds(chosen_N) - _log_odds(rejected_N)
    loss, metrics = _over_pairs(-coefficient * logsigmoid(log_odds_ratio_N), pairs, denominator)
    return loss, {**metrics, "log_odds_ratio": log_odds_ratio_N.detach().sum() / denominator}


def nll_term(policy_chosen_N: Tensor, chosen_lengths_N: Tensor, *, coefficient: float, denominator: float) -> Loss:
    """``-c sum mean_w / denominator``: the chosen responses' mean nats a token, to be added to a loss over pairs.

    The mean is over a response's tokens, then over responses, so that lengths do not weigh (RPO: DPO with this; Pang
    et al. 2024). With ``orpo_loss`` c is 1.

    Metrics: ``chosen_nll``, without the coefficient.

    Args:
        chosen_lengths_N: response tokens, from 1.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: a response is empty, lengths differ, or the denominator is not positive.
    """
    require_positive(denominator)
    nll = -mean_logprobs(policy_chosen_N, chosen_lengths_N).sum() / denominator
    return coefficient * nll, {"chosen_nll": nll.detach()}


class _Pairs(NamedTuple):
    """What the metrics of a pair are made of. Gradients flow through the rewards."""

    chosen_rewards_N: Tensor
    rejected_rewards_N: Tensor
    policy_chosen_N: Tensor
    policy_rejected_N: Tensor
    #: Mean of both responses, or none without a reference.
    ref_kl_N: Tensor | None

    @property
    def margin_N(self) -> Tensor:
        return self.chosen_rewards_N - self.rejected_rewards_N


def _with_reference(
    policy_chosen_N: Tensor, policy_rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, beta: float
) -> _Pairs:
    require_same_length(
        policy_chosen=policy_chosen_N,
        policy_rejected=policy_rejected_N,
        ref_chosen=ref_chosen_N,
        ref_rejected=ref_rejected_N,
    )
    _require_beta(beta)
    chosen_N = policy_chosen_N - ref_chosen_N.detach()
    rejected_N = policy_rejected_N - ref_rejected_N.detach()
    ref_kl_N = (k1(ref_chosen_N, policy_chosen_N) + k1(ref_rejected_N, policy_rejected_N)) / 2
    return _Pairs(beta * chosen_N, beta * rejected_N, policy_chosen_N, policy_rejected_N, ref_kl_N)


def _without_reference(
    policy_chosen_N: Tensor, policy_rejected_N: Tensor, chosen_rewards_N: Tensor, rejected_rewards_N: Tensor
) -> _Pairs:
    require_same_length(policy_chosen=policy_chosen_N, policy_rejected=policy_rejected_N)
    return _Pairs(chosen_rewards_N, rejected_rewards_N, policy_chosen_N, policy_rejected_N, None)


def _over_pairs(losses_N: Tensor, pairs: _Pairs, denominator: float) -> Loss:
    """The loss, and the metrics that all losses over pairs have."""
    require_positive(denominator)
    with torch.no_grad():
        per_pair = {
            "chosen_reward": pairs.chosen_rewards_N,
            "rejected_reward": pairs.rejected_rewards_N,
            "reward_margin": pairs.margin_N,
            "reward_accuracy": wins(pairs.margin_N),
            "chosen_logprob": pairs.policy_chosen_N,
            "rejected_logprob": pairs.policy_rejected_N,
        }
        if pairs.ref_kl_N is not None:
            per_pair["ref_kl"] = pairs.ref_kl_N
        metrics = {name: values_N.sum() / denominator for name, values_N in per_pair.items()}
    return losses_N.sum() / denominator, metrics


def _log_odds(logprobs_N: Tensor) -> Tensor:
    """``log(P / (1 - P))`` of log P.

    Where P is small, ``log(1 - P)`` keeps no digits of its own, and needs none beside log P.
    """
    below_N = logprobs_N.clamp(max=-torch.finfo(logprobs_N.dtype).eps / 2)
    return below_N - (-below_N.expm1()).log()


def _require_beta(beta: float) -> None:
    if not beta > 0:
        raise AlgorithmError(f"beta {beta}; it must be above 0")


def _require_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise AlgorithmError(f"label_smoothing {label_smoothing}; it is a share of wrong labels, from 0 and below 0.5")
