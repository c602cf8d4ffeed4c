"""Losses of reward models: a score for each response, and people's order of the responses to one prompt.

Legend: N responses (each forwarded once) of P prompts, laid end to end; ``offsets`` (P+1,) int64 are where prompts
begin and end; M pairs of two responses to one prompt. In the losses over pairs alone, N are the pairs.

Invariants:

- As in ``algorithms.losses``: a loss and each metric are sums over what is given, divided by a ``denominator`` counted
  over the global batch, so micro-batches and ranks add up as long as no prompt is cut; nothing gives 0.
- Every ranked prompt weighs the same, whatever its number of responses.
- Only differences of the scores of one prompt matter, except to the centring terms, which are there for the rest.
- Gradients flow into scores and into nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.errors import AlgorithmError
from algorithms.losses import Loss
from algorithms.shapes import require_offsets, require_positive, require_same_length


class RankedPairs(NamedTuple):
    """M pairs of responses to one prompt, of which one is ranked better."""

    #: (M,) int64, positions among the N responses.
    better_M: Tensor
    worse_M: Tensor
    #: (M,) int64, which prompt.
    prompts_M: Tensor
    #: (M,) float64, one over the number of pairs of the prompt: the weights of a ranked prompt add up to 1.
    weights_M: Tensor


def ranked_pairs(ranks_N: Tensor, offsets: Tensor) -> RankedPairs:
    """Every two responses to one prompt whose ranks differ; a tie gives no pair.

    >>> ranked_pairs(torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 3, 5]))[:3]
    (tensor([0, 0, 4]), tensor([1, 2, 3]), tensor([0, 0, 1]))

    Args:
        ranks_N: integers, 0 the best.

    Raises:
        AlgorithmError: ranks are not integers (as scores, of which the highest is best, would be).
        ShapeMismatch: offsets do not cover them.
    """
    require_same_length(ranks=ranks_N)
    if ranks_N.is_floating_point():
        raise AlgorithmError(f"ranks are integers, 0 the best, got {ranks_N.dtype}")
    require_offsets(offsets, len(ranks_N))
    prompts_N = _prompts(offsets)
    positions = torch.arange(len(ranks_N), device=offsets.device)
    # Each response is paired with every one that stands after it in its prompt.
    num_after_N = offsets[1:][prompts_N] - 1 - positions
    first = positions.repeat_interleave(num_after_N)
    pairs_before_N = num_after_N.cumsum(0) - num_after_N
    second = first + 1 + torch.arange(len(first), device=offsets.device) - pairs_before_N[first]
    kept = (ranks_N[first] != ranks_N[second]).nonzero()[:, 0]
    first, second = first[kept], second[kept]
    in_order = ranks_N[first] < ranks_N[second]
    prompts_M = prompts_N[first]
    num_pairs_P = torch.bincount(prompts_M, minlength=len(offsets) - 1)
    return RankedPairs(
        first.where(in_order, second),
        second.where(in_order, first),
        prompts_M,
        num_pairs_P[prompts_M].double().reciprocal(),
    )


def ranks_of_preferences(preferences_P: Tensor) -> Tensor:
    """Ranks of two responses each, end to end, (2P,) int64: the more probably better one is 0, and 0.5 is a tie.

    >>> ranks_of_preferences(torch.tensor([0.8, 0.2, 0.5]))
    tensor([0, 1, 1, 0, 0, 0])

    Args:
        preferences_P: probability that the first is better.
    """
    return torch.stack([preferences_P < 0.5, preferences_P > 0.5], dim=1).flatten().long()


def num_ranked_prompts(ranks_N: Tensor, offsets: Tensor) -> int:
    """Prompts of which at least two responses differ in rank: what the K-wise losses are divided by.

    >>> num_ranked_prompts(torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 2, 4, 5]))
    1

    Raises:
        AlgorithmError: ranks are not integers.
        ShapeMismatch: offsets do not cover them.
    """
    return int(_has_pair(ranked_pairs(ranks_N, offsets), offsets).sum())


def pairwise_loss(chosen_scores_N: Tensor, rejected_scores_N: Tensor, *, denominator: float) -> Loss:
    """Bradley-Terry: ``-sum log sigmoid(chosen - rejected) / denominator`` (Ouyang et al. 2022, equation 1, K = 2).

    Gradients flow into both. Untrained, with all scores equal, it is ln 2 a pair.

    Metrics: ``accuracy``, a tie counting half; ``margin`` the mean of ``chosen - rejected``; ``score`` the mean of
    all scores.

    Args:
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    require_same_length(chosen=chosen_scores_N, rejected=rejected_scores_N)
    require_positive(denominator)
    margin = chosen_scores_N - rejected_scores_N
    loss = -logsigmoid(margin).sum() / denominator
    with torch.no_grad():
        metrics = {
            "accuracy": wins(margin).sum() / denominator,
            "margin": margin.sum() / denominator,
            "score": (chosen_scores_N + rejected_scores_N).sum() / (2 * denominator),
        }
    return loss, metrics


def soft_pairwise_loss(
    first_scores_N: Tensor, second_scores_N: Tensor, preferences_N: Tensor, *, denominator: float
) -> Loss:
    """Cross-entropy against a probability p that the first is the better one.

    ``-sum (p log sigmoid(d) + (1 - p) log sigmoid(-d)) / denominator`` with ``d = first - second``. With p = 1 it is
    ``pairwise_loss``. It is least at ``sigmoid(d) = p``, and there it is the entropy of p, not 0.

    Metrics as of ``pairwise_loss``: ``accuracy`` and ``margin`` of the one that is more probably better over the
    other. A pair of p = 0.5 has none: half right, and margin 0.

    Args:
        preferences_N: from 0 to 1.
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: a preference is no probability, lengths differ, or the denominator is not positive.
    """
    require_same_length(first=first_scores_N, second=second_scores_N, preferences=preferences_N)
    require_positive(denominator)
    if not bool(((preferences_N >= 0) & (preferences_N <= 1)).all()):
        raise AlgorithmError("a preference is a probability that the first is better, from 0 to 1")
    margin = first_scores_N - second_scores_N
    loss = soft_cross_entropy(margin, preferences_N.detach().to(margin)).sum() / denominator
    with torch.no_grad():
        signed = margin * (preferences_N - 0.5).sign().to(margin)
        metrics = {
            "accuracy": wins(signed).sum() / denominator,
            "margin": signed.sum() / denominator,
            "score": (first_scores_N + second_scores_N).sum() / (2 * denominator),
        }
    return loss, metrics


def kwise_loss(
    scores_N: Tensor, ranks_N: Tensor, offsets: Tensor, *, margins_P: Tensor | None = None, denominator: float
) -> Loss:
    """InstructGPT's ranking loss: the mean over the pairs of a prompt, summed over prompts, over the denominator.

    ``sum_p 1/M_p sum_(w, l) -log sigmoid(r_w - r_l - m_p) / denominator`` over the M_p pairs of prompt p whose ranks
    differ (Ouyang et al. 2022, equation 1). Ties are dropped there too; here the divisor is the number of pairs kept,
    so ties do not make a prompt lighter, and a prompt without a pair adds nothing. K = 2 is ``pairwise_loss``.
    The margin is Llama 2's (Touvron et al. 2023, equation 2), whose prompts have one pair.

    Metrics, each a mean over the pairs of a prompt and then over prompts: ``accuracy``, without the margin, two equal
    scores counting half; ``margin`` the mean of ``r_w - r_l``. And ``score``: the mean over the responses of a ranked
    prompt, then over prompts.

    Args:
        ranks_N: integers, 0 the best.
        margins_P: m, for each pair of a prompt; none is 0.
        denominator: ``num_ranked_prompts`` of the global batch.

    Raises:
        AlgorithmError: ranks are not integers, lengths differ, offsets do not cover the responses, or the denominator
            is not positive.
    """
    require_same_length(scores=scores_N, ranks=ranks_N)
    require_positive(denominator)
    pairs = ranked_pairs(ranks_N, offsets)
    weights_M = pairs.weights_M.to(scores_N)
    difference = scores_N[pairs.better_M] - scores_N[pairs.worse_M]
    shifted = difference
    if margins_P is not None:
        require_same_length(margins=margins_P, prompts=offsets[1:])
        shifted = difference - margins_P.detach().to(scores_N)[pairs.prompts_M]
    loss = -(logsigmoid(shifted) * weights_M).sum() / denominator
    with torch.no_grad():
        metrics = {
            "accuracy": (wins(difference) * weights_M).sum() / denominator,
            "margin": (difference * weights_M).sum() / denominator,
            "score": _ranked_means(scores_N, pairs, offsets).sum() / denominator,
        }
    return loss, metrics


def best_of_loss(scores_N: Tensor, ranks_N: Tensor, offsets: Tensor, *, denominator: float) -> Loss:
    """Softmax cross-entropy of the best against those ranked worse (Ziegler et al. 2019, equation 1).

    ``sum_p mean_b (log(exp r_b + sum_w exp r_w) - r_b) / denominator`` over the best b of prompt p (as a rule one) and
    the responses w of worse rank. Equals of the best stand in no other one's softmax, so no response is trained
    against its equal, and in which order they are given does not matter. Beyond the best, ranks are not used. A prompt
    whose responses are all equal, or that has one, adds nothing. Two responses make it ``pairwise_loss``. Untrained it
    is ln K a prompt of K responses with one best.

    Metrics, means over the best of a prompt and then over prompts: ``accuracy``, where none that is worse scores
    higher, shared with those that score the same; ``margin`` the best's score less the mean of the worse. And
    ``score``: the mean over the responses of a ranked prompt, then over prompts.

    Args:
        ranks_N: integers, the lowest of a prompt the best.
        denominator: ``num_ranked_prompts`` of the global batch.

    Raises:
        AlgorithmError: ranks are not integers, lengths differ, offsets do not cover the responses, or the denominator
            is not positive.
    """
    require_same_length(scores=scores_N, ranks=ranks_N)
    require_positive(denominator)
    pairs = ranked_pairs(ranks_N, offsets)
    is_best_N = _of_lowest_rank(ranks_N, offsets)
    best_M, worse_M = pairs.better_M[is_best_N[pairs.better_M]], pairs.worse_M[is_best_N[pairs.better_M]]
    num_worse_N = torch.bincount(best_M, minlength=len(scores_N))
    # Of a response that is no best, or has none below it, all sums are over nothing: log(exp 0) = 0, weight 0.
    weights_N = _shares(num_worse_N > 0, offsets).to(scores_N)
    over_M = scores_N[worse_M] - scores_N[best_M]
    nothing_N = scores_N.new_zeros(len(scores_N))
    # The best's own term of the softmax is exp 0; the highest term is taken out, so that none overflows.
    highest_N = nothing_N.scatter_reduce(0, best_M, over_M.detach(), "amax")
    sums_N = (-highest_N).exp().index_add(0, best_M, (over_M - highest_N[best_M]).exp())
    loss = ((sums_N.log() + highest_N) * weights_N).sum() / denominator
    with torch.no_grad():
        num_higher_N = nothing_N.index_add(0, best_M, (over_M > 0).to(scores_N))
        num_same_N = nothing_N.index_add(0, best_M, (over_M == 0).to(scores_N))
        margin_N = -nothing_N.index_add(0, best_M, over_M) / num_worse_N.clamp(min=1)
        metrics = {
            "accuracy": ((num_higher_N == 0) / (1 + num_same_N) * weights_N).sum() / denominator,
            "margin": (margin_N * weights_N).sum() / denominator,
            "score": _ranked_means(scores_N, pairs, offsets).sum() / denominator,
        }
    return loss, metrics


def centring_term(
    chosen_scores_N: Tensor, rejected_scores_N: Tensor, *, coefficient: float, denominator: float
) -> Loss:
    """``coefficient * sum (chosen + rejected)^2 / denominator``: scores near 0 on average (TRL's ``RewardTrainer``).

    The ranking losses leave the mean of a prompt's scores free, and it drifts; this holds it. Both scores of a pair
    get the same gradient, so it does not work against their difference.

    Metrics: ``centring``, the term itself.

    Args:
        denominator: pairs of the global batch.

    Raises:
        AlgorithmError: lengths differ, or the denominator is not positive.
    """
    require_same_length(chosen=chosen_scores_N, rejected=rejected_scores_N)
    require_positive(denominator)
    term = coefficient * (chosen_scores_N + rejected_scores_N).square().sum() / denominator
    return term, {"centring": term.detach()}


def kwise_centring_term(
    scores_N: Tensor, ranks_N: Tensor, offsets: Tensor, *, coefficient: float, denominator: float
) -> Loss:
    """``coefficient * sum_p (2 mean_k r_pk)^2 / denominator`` over the prompts that have a pair.

    ``centring_term`` for K responses: equal to it where K = 2, and like it with one gradient for all responses of a
    prompt. (A mean of ``(r_i + r_j)^2`` over pairs would be equal to it at K = 2 too, but beyond that it draws the
    responses of a prompt together, against the ranking.)

    Metrics: ``centring``, the term itself.

    Args:
        denominator: ``num_ranked_prompts`` of the global batch.

    Raises:
        AlgorithmError: as ``kwise_loss``.
    """
    require_same_length(scores=scores_N, ranks=ranks_N)
    require_positive(denominator)
    means_P = _ranked_means(scores_N, ranked_pairs(ranks_N, offsets), offsets)
    term = coefficient * (2 * means_P).square().sum() / denominator
    return term, {"centring": term.detach()}


def accuracy_counts(scores_N: Tensor, ranks_N: Tensor, offsets: Tensor, buckets_P: Tensor, num_buckets: int) -> Tensor:
    """For each bucket of prompts (of one rating, say) how many are ranked, and the sum of their accuracies.

    (num_buckets, 2) float64; counts of micro-batches and ranks add up. Column 1 over column 0 is the bucket's
    accuracy, and the column sums one over the other the ``accuracy`` of ``kwise_loss``.

    Args:
        ranks_N: integers, 0 the best.
        buckets_P: int64, from 0 to ``num_buckets - 1``.

    Raises:
        AlgorithmError: a bucket is outside, or as ``kwise_loss``.
    """
    require_same_length(scores=scores_N, ranks=ranks_N)
    require_same_length(buckets=buckets_P, prompts=offsets[1:])
    if not bool(((buckets_P >= 0) & (buckets_P < num_buckets)).all()):
        lowest, highest = int(buckets_P.min()), int(buckets_P.max())
        raise AlgorithmError(f"buckets from {lowest} to {highest}; there are {num_buckets}, from 0")
    pairs = ranked_pairs(ranks_N, offsets)
    difference = scores_N.detach()[pairs.better_M] - scores_N.detach()[pairs.worse_M]
    sums = torch.stack([pairs.weights_M, pairs.weights_M * wins(difference)], dim=1)
    return sums.new_zeros(num_buckets, 2).index_add(0, buckets_P[pairs.prompts_M], sums)


def soft_cross_entropy(difference: Tensor, probability: Tensor | float) -> Tensor:
    """``-(p log sigmoid(d) + (1 - p) log sigmoid(-d))``, elementwise, finite for every finite d."""
    return -(probability * logsigmoid(difference) + (1 - probability) * logsigmoid(-difference))


def wins(difference: Tensor) -> Tensor:
    """1 where it is above 0, 0.5 where it is 0, else 0; elementwise, of the same type."""
    return (difference > 0).to(difference) + 0.5 * (difference == 0).to(difference)


def _prompts(offsets: Tensor) -> Tensor:
    """Which prompt each response belongs to, (N,)."""
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())


def _of_lowest_rank(ranks_N: Tensor, offsets: Tensor) -> Tensor:
    """bool (N,): the best of each prompt, all of them where several are equal."""
    prompts_N = _prompts(offsets)
    lowest_P = ranks_N.new_zeros(len(offsets) - 1).scatter_reduce(0, prompts_N, ranks_N, "amin", include_self=False)
    return ranks_N == lowest_P[prompts_N]


def _shares(chosen_N: Tensor, offsets: Tensor) -> Tensor:
    """float64 (N,): one over the number of responses chosen of the prompt, for each of these; 0 for others."""
    prompts_N = _prompts(offsets)
    num_chosen_P = torch.bincount(prompts_N[chosen_N], minlength=len(offsets) - 1)
    return chosen_N.double() / num_chosen_P[prompts_N].clamp(min=1)


def _ranked_means(scores_N: Tensor, pairs: RankedPairs, offsets: Tensor) -> Tensor:
    """Mean over all responses of each prompt that has a pair, (P,), and 0 elsewhere.

    Where any two ranks differ, every response differs from one of the two: all of them are in a pair.
    """
    lengths = offsets.diff()
    sums_P = scores_N.new_zeros(len(lengths)).index_add(0, _prompts(offsets), scores_N)
    return (sums_P / lengths.clamp(min=1)).where(_has_pair(pairs, offsets), 0)


def _has_pair(pairs: RankedPairs, offsets: Tensor) -> Tensor:
    """bool (P,)."""
    return torch.bincount(pairs.prompts_M, minlength=len(offsets) - 1) > 0
