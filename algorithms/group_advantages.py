"""Advantages without a critic: a sample is judged against others of its prompt, a baseline, or the whole batch.

Legend: N samples, T their response tokens laid end to end; ``offsets`` (N+1,) int64 are where samples begin and end;
``group_ids_N`` (N,) int64 names each sample's prompt; U turns.

Invariants:

- Samples of a prompt need not be neighbours, and groups may differ in size. Neither the order of the samples nor the
  numbers that name the groups matter, but for the last digit.
- A group whose scores are all equal gets advantages of exactly 0 from every estimator that subtracts its mean, also
  where the mean is rounded: scores are shifted by the group's smallest first.
- Give the estimators the whole global batch: a group that is cut apart, or a batch whitened in parts, gives others.
- Scores are taken to be finite. One that is not spoils its own group only, except where the batch is whitened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.advantages import gae, whiten
from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.packed import sample_sums, spread
from algorithms.shapes import require_offsets, require_same_length


def grpo(scores_N: Tensor, group_ids_N: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``(score - mean) / (std + eps)`` of the group, (N,) (Shao et al. 2024, DeepSeekMath, section 4.1.2).

    The standard deviation is the unbiased one (n - 1), as in TRL, verl and OpenRLHF; the paper does not say which. A
    sample alone in its group gets 0: it has nothing to be compared with.

    >>> grpo(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 0]), eps=0.0)
    tensor([-1.,  0.,  1.])

    Raises:
        ShapeMismatch: scores and ids differ in length.
    """
    groups = _groups(scores_N, group_ids_N)
    centred_N = groups.centred(scores_N)
    variance_G = groups.sums(centred_N.square()) / (groups.sizes_G - 1).clamp(min=1)
    return centred_N / (variance_G.sqrt()[groups.index_N] + eps)


def dr_grpo(scores_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """``score - mean`` of the group, (N,): GRPO without the division by the deviation (Liu et al. 2025).

    That division weighs prompts that are nearly always, or nearly never, solved more than the others. The paper's
    other change, a constant divisor of the loss, is ``loss_terms.constant_length_weights``.

    >>> dr_grpo(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 0]))
    tensor([-2.,  0.,  2.])

    Raises:
        ShapeMismatch: scores and ids differ in length.
    """
    return _groups(scores_N, group_ids_N).centred(scores_N)


def rloo(scores_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """``score - mean of the others in the group``, (N,) (Ahmadian et al. 2024; Kool et al. 2019).

    Equal to ``n / (n - 1)`` times ``dr_grpo``. A group of one is refused: its baseline would be a mean of nothing, and
    both ways out mislead. Its bare score as advantage is far larger than the others', and a 0 hides that the group
    is broken. Drop such samples first, by ``groups_without_signal``.

    >>> rloo(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 0]))
    tensor([-3.,  0.,  3.])

    Raises:
        ShapeMismatch: scores and ids differ in length.
        AlgorithmError: a group has one sample only.
    """
    groups = _groups(scores_N, group_ids_N)
    if bool((alone_N := groups.sizes_G[groups.index_N] < 2).any()):
        prompt = int(group_ids_N[alone_N][0])
        raise AlgorithmError(f"prompt {prompt} has 1 sample; a leave-one-out baseline needs 2 or more, or drop it")
    sizes_N = groups.sizes_G[groups.index_N].to(scores_N)
    return groups.centred(scores_N) * sizes_N / (sizes_N - 1)


def remax(scores_N: Tensor, greedy_scores_N: Tensor) -> Tensor:
    """``score - score of the greedy response`` to the same prompt, (N,) (Li et al. 2023, ReMax).

    Raises:
        ShapeMismatch: the two differ in length.
    """
    require_same_length(scores=scores_N, greedy_scores=greedy_scores_N)
    return scores_N - greedy_scores_N


def score_difference(scores_N: Tensor, initial_scores_N: Tensor) -> Tensor:
    """``score - score of the initial model's response`` to the same prompt, (N,).

    The baseline does not depend on the policy's response, so the gradient stays unbiased, and it can take the place
    of a critic. It does not follow the policy: as that gets better, all advantages become positive.

    Raises:
        ShapeMismatch: the two differ in length.
    """
    require_same_length(scores=scores_N, initial_scores=initial_scores_N)
    return scores_N - initial_scores_N


def reinforce_plus_plus(rewards_T: Tensor, offsets: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted return-to-go, whitened over all tokens of the global batch, (T,) (Hu et al. 2025, REINFORCE++).

    ``rewards_T`` carry the score on the last token and the KL penalty on each (``rewards.per_token_rewards``). The
    variance is the biased one (``advantages.whiten``).

    Raises:
        ShapeMismatch: the offsets do not cover the rewards.
    """
    return whiten(returns_to_go(rewards_T, offsets, gamma=gamma))


def reinforce_plus_plus_baseline(scores_N: Tensor, group_ids_N: Tensor, offsets: Tensor) -> Tensor:
    """``score - mean`` of the group on every token, whitened over all tokens of the global batch, (T,).

    (Hu et al. 2025, REINFORCE++ with baseline.) The paper puts the KL into the loss here, with k2
    (``loss_terms.kl_term``). Whitening is over tokens, so a long response weighs more in mean and deviation than a
    short one (as in OpenRLHF and verl).

    Raises:
        ShapeMismatch: scores and ids differ in length, or offsets are not of as many samples.
    """
    return whiten(spread(dr_grpo(scores_N, group_ids_N), offsets))


def groups_without_signal(scores_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """Where all scores of the sample's group are equal, (N,) bool: no group estimator learns anything from it.

    What DAPO's dynamic sampling drops and replaces (Yu et al. 2025, section 3.2, there for accuracies of 0 and 1). A
    group of one is without signal.

    >>> groups_without_signal(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 3, 3]))
    tensor([False, False,  True,  True])

    Raises:
        ShapeMismatch: scores and ids differ in length.
    """
    groups = _groups(scores_N, group_ids_N)
    return (groups.smallest(scores_N) == -groups.smallest(-scores_N))[groups.index_N]


def returns_to_go(rewards_T: Tensor, offsets: Tensor, *, gamma: float) -> Tensor:
    """``G_t = r_t + gamma G_{t+1}`` within each sample, (T,): generalised advantages where all values are 0.

    Rewards may stand on any token: the score on the last, a turn's reward on the turn's last, or one on each.

    >>> returns_to_go(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0, 3]), gamma=0.5)
    tensor([1.5000, 3.0000, 4.0000])

    Raises:
        ShapeMismatch: the offsets do not cover the rewards.
    """
    return gae(rewards_T, torch.zeros_like(rewards_T), offsets, gamma, 1.0)[0]


def turn_grpo(
    rewards_T: Tensor, turn_offsets: Tensor, offsets: Tensor, group_ids_N: Tensor, *, gamma: float
) -> Tensor:
    """GRPO turn by turn: a turn's return is judged against those of the group's turns of the same number, (T,).

    A turn is credited with what came at it and after it, not with what earlier turns earned; samples of one turn each
    give what ``grpo`` gives. A turn whose number no other sample of its group reached gets 0.

    >>> rewards = torch.tensor([1.0, 3.0, 0.0, 1.0])  # two samples of two turns of one token each
    >>> one = torch.tensor([7, 7])
    >>> turn_grpo(rewards, torch.arange(5), torch.tensor([0, 2, 4]), one, gamma=1.0)
    tensor([ 0.7071,  0.7071, -0.7071, -0.7071])

    Raises:
        ShapeMismatch: as ``turn_returns`` and ``grpo``.
    """
    rewards_U = sample_sums(rewards_T, turn_offsets)
    returns_T = turn_returns(rewards_U, turn_offsets, offsets, gamma=gamma)
    first_turns = torch.searchsorted(turn_offsets, offsets.to(turn_offsets))
    require_same_length(samples=offsets[1:], group_ids=group_ids_N)
    numbers_U = torch.arange(len(rewards_U), device=rewards_U.device) - spread(first_turns[:-1], first_turns)
    pairs = torch.stack([spread(group_ids_N, first_turns), numbers_U], dim=1)
    _, groups_U = torch.unique(pairs, dim=0, return_inverse=True)
    return spread(grpo(returns_T[turn_offsets[1:] - 1], groups_U), turn_offsets)


def turn_returns(turn_rewards_U: Tensor, turn_offsets: Tensor, offsets: Tensor, *, gamma: float) -> Tensor:
    """Return of the turn that a token belongs to, on each of its tokens, (T,); discounted by turn, not by token.

    ``G_u = r_u + gamma G_{u+1}`` over the turns of a sample. To discount by token, put the rewards on the turns' last
    tokens and take ``returns_to_go``.

    >>> turn_returns(torch.tensor([1.0, 4.0]), torch.tensor([0, 2, 3]), torch.tensor([0, 3]), gamma=0.5)
    tensor([3., 3., 4.])

    Args:
        turn_offsets: (U+1,) int64, where turns begin and end among the T tokens; no turn is empty.
        offsets: (N+1,), as ever; each is one of ``turn_offsets``.

    Raises:
        ShapeMismatch: rewards and turns differ in number, a turn is empty, or one reaches over the end of a sample.
    """
    turns_T = spread(torch.arange(len(turn_rewards_U), device=turn_rewards_U.device), turn_offsets)
    require_offsets(offsets, len(turns_T))
    require_same_length(turn_rewards=turn_rewards_U, lengths=turn_offsets[1:])
    if bool((empty_U := turn_offsets.diff() < 1).any()):
        raise ShapeMismatch(f"turn {int(empty_U.nonzero()[0])} of the batch has no token")
    offsets = offsets.to(turn_offsets)
    first_turns = torch.searchsorted(turn_offsets, offsets)
    if bool((astray := turn_offsets[first_turns] != offsets).any()):
        end = int(offsets[astray][0])
        raise ShapeMismatch(f"a sample ends at token {end}, in the midst of a turn; turns must end with their sample")
    return returns_to_go(turn_rewards_U, first_turns, gamma=gamma)[turns_T]


@dataclass(frozen=True)
class _Groups:
    """G groups: ``index_N`` tells each sample's, ``sizes_G`` how many samples each has."""

    index_N: Tensor
    sizes_G: Tensor

    def sums(self, numbers_N: Tensor) -> Tensor:
        return numbers_N.new_zeros(len(self.sizes_G)).index_add(0, self.index_N, numbers_N)

    def smallest(self, numbers_N: Tensor) -> Tensor:
        nothing = numbers_N.new_zeros(len(self.sizes_G))
        return nothing.scatter_reduce(0, self.index_N, numbers_N, "amin", include_self=False)

    def centred(self, numbers_N: Tensor) -> Tensor:
        """Each number less its group's mean. Shifted first, so that equal numbers give exactly 0."""
        shifted_N = numbers_N - self.smallest(numbers_N)[self.index_N]
        return shifted_N - (self.sums(shifted_N) / self.sizes_G)[self.index_N]


def _groups(scores_N: Tensor, group_ids_N: Tensor) -> _Groups:
    require_same_length(scores=scores_N, group_ids=group_ids_N)
    _, index_N, sizes_G = torch.unique(group_ids_N, return_inverse=True, return_counts=True)
    return _Groups(index_N, sizes_G)
