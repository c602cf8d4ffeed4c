"""Advantages by group and by baseline: values by hand, slow code, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.group_advantages import (
    dr_grpo,
    groups_without_signal,
    grpo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    returns_to_go,
    rloo,
    score_difference,
    turn_returns,
)
from tests.algorithms import slow

BY_GROUP = [grpo, dr_grpo, rloo]
Estimator = Callable[[Tensor, Tensor], Tensor]


def random_scores(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Groups of 2 to 6, none next to its own, with ids that are neither small nor in order."""
    source = torch.Generator().manual_seed(seed)
    sizes = [2, 6, 3, 4, 2, 5]
    ids = [prompt for prompt, size in zip([40, -7, 3, 10**12, 0, 8], sizes, strict=True) for _ in range(size)]
    order = torch.randperm(len(ids), generator=source)
    scores_N = 3 + 2 * torch.randn(len(ids), dtype=torch.float64, generator=source)
    return scores_N, torch.tensor(ids)[order]


def slow_by_group(name: str, scores: list[float], ids: list[int]) -> list[float]:
    advantages = []
    for place, (score, prompt) in enumerate(zip(scores, ids, strict=True)):
        group = [other for other, its in zip(scores, ids, strict=True) if its == prompt]
        mean = sum(group) / len(group)
        if name == "grpo":
            deviation = math.sqrt(sum((other - mean) ** 2 for other in group) / (len(group) - 1))
            advantages.append((score - mean) / (deviation + 1e-6))
        elif name == "dr_grpo":
            advantages.append(score - mean)
        else:
            others = [scores[i] for i in range(len(scores)) if ids[i] == prompt and i != place]
            advantages.append(score - sum(others) / len(others))
    return advantages


def test_by_hand() -> None:
    """Prompt 5: 1, 2, 6, mean 3, unbiased variance (4 + 1 + 9) / 2 = 7. Prompt 9: 0, 4, mean 2, variance 8.

    Leave one out: 1 - 4, 2 - 3.5, 6 - 1.5; 0 - 4, 4 - 0.
    """
    scores_N, ids_N = torch.tensor([1.0, 0.0, 2.0, 4.0, 6.0], dtype=torch.float64), torch.tensor([5, 9, 5, 9, 5])
    root7, root8 = math.sqrt(7), math.sqrt(8)
    got = grpo(scores_N, ids_N, eps=0.0)
    assert got.tolist() == pytest.approx([-2 / root7, -2 / root8, -1 / root7, 2 / root8, 3 / root7])
    assert grpo(scores_N, ids_N, eps=1.0).tolist()[4] == pytest.approx(3 / (root7 + 1))
    assert dr_grpo(scores_N, ids_N).tolist() == [-2.0, -2.0, -1.0, 2.0, 3.0]
    assert rloo(scores_N, ids_N).tolist() == [-3.0, -4.0, -1.5, 4.0, 4.5]


@pytest.mark.parametrize("estimator", BY_GROUP)
@pytest.mark.parametrize("seed", range(3))
def test_equals_slow_code(estimator: Estimator, seed: int) -> None:
    scores_N, ids_N = random_scores(seed)
    expected = slow_by_group(estimator.__name__, scores_N.tolist(), ids_N.tolist())
    torch.testing.assert_close(estimator(scores_N, ids_N), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", BY_GROUP)
def test_neither_order_nor_names_nor_other_groups_matter(estimator: Estimator) -> None:
    scores_N, ids_N = random_scores()
    whole_N = estimator(scores_N, ids_N)
    order = torch.randperm(len(ids_N), generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(estimator(scores_N[order], ids_N[order]), whole_N[order])
    torch.testing.assert_close(estimator(scores_N, 1000 - ids_N), whole_N)
    for prompt in torch.unique(ids_N):
        own = ids_N == prompt
        assert torch.equal(estimator(scores_N[own], ids_N[own]), whole_N[own])
    scores_N[ids_N == 8] = torch.nan
    assert torch.equal(estimator(scores_N, ids_N).isnan(), ids_N == 8)


@pytest.mark.parametrize("estimator", BY_GROUP)
def test_a_shift_of_scores_does_not_matter_and_groups_sum_to_zero(estimator: Estimator) -> None:
    scores_N, ids_N = random_scores()
    got_N = estimator(scores_N, ids_N)
    torch.testing.assert_close(estimator(scores_N + 1000.0 * ids_N.sign(), ids_N), got_N, rtol=1e-9, atol=1e-9)
    for prompt in torch.unique(ids_N):
        assert float(got_N[ids_N == prompt].sum()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("estimator", BY_GROUP)
@pytest.mark.parametrize("score", [0.1, -1e30, 1 / 3, 16777217.0])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_equal_scores_give_exactly_nothing(estimator: Estimator, score: float, size: int) -> None:
    """0.1 + 0.1 + 0.1, over 3, is not 0.1; divided by a deviation of rounding it would be an advantage."""
    assert estimator(torch.full((size,), score), torch.zeros(size, dtype=torch.int64)).tolist() == [0.0] * size


def test_extreme_scores_stay_finite() -> None:
    scores_N, ids_N = torch.tensor([1e-30, 2e-30, 1e15, -1e15]), torch.tensor([0, 0, 1, 1])
    for estimator in BY_GROUP:
        assert bool(estimator(scores_N, ids_N).isfinite().all())
    assert grpo(scores_N, ids_N)[2:].tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])


def test_alone_in_its_group() -> None:
    scores_N, ids_N = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4, 2, 2])
    assert grpo(scores_N, ids_N)[0] == dr_grpo(scores_N, ids_N)[0] == 0
    assert bool(groups_without_signal(scores_N, ids_N)[0])
    with pytest.raises(AlgorithmError, match="prompt 4 has 1 sample; a leave-one-out baseline needs 2"):
        rloo(scores_N, ids_N)


@pytest.mark.parametrize("estimator", [*BY_GROUP, groups_without_signal])
def test_nothing_and_wrong_shapes(estimator: Estimator) -> None:
    assert estimator(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    with pytest.raises(ShapeMismatch, match=r"'scores': \(3,\), 'group_ids': \(2,\)"):
        estimator(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        estimator(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("function", [remax, score_difference])
def test_baselines(function: Estimator) -> None:
    assert function(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])).tolist() == [2.0, -2.0]
    assert function(torch.zeros(0), torch.zeros(0)).shape == (0,)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        function(torch.zeros(2), torch.zeros(2, 1))


def test_a_baseline_keeps_the_gradient_unbiased() -> None:
    """Over all actions of a small policy: E[(r - b) grad log p] is the same for any b, and is the gradient of E[r]."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    chances = logits.softmax(0)
    (expected,) = torch.autograd.grad((chances * rewards).sum(), logits, retain_graph=True)
    for baseline in (0.0, 2.5, -40.0):
        advantages = score_difference(rewards, torch.full_like(rewards, baseline))
        surrogate = (chances.detach() * advantages * logits.log_softmax(0)).sum()
        torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], expected)


def test_rloo_is_unbiased() -> None:
    """Over all pairs of draws from a small policy, the mean of advantage times grad log p is the gradient of E[r]."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits, retain_graph=True)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(3):
        for second in range(3):
            drawn = torch.tensor([first, second])
            advantages = rloo(rewards[drawn], torch.zeros(2, dtype=torch.int64))
            chance = float(logprobs[drawn].detach().sum().exp())
            total = total + chance * (advantages * logprobs[drawn]).mean()
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], expected)


def test_groups_without_signal() -> None:
    scores_N = torch.tensor([0.1, 1.0, 0.1, 0.0, 0.1, -0.0, 0.0])
    ids_N = torch.tensor([3, 1, 3, 1, 3, 7, 7])
    assert groups_without_signal(scores_N, ids_N).tolist() == [True, False, True, False, True, True, True]
    scores_N[4] = 0.1001
    assert groups_without_signal(scores_N, ids_N).tolist() == [False, False, False, False, False, True, True]


# ---- returns


def slow_returns(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (u - t) * rewards[u] for u in range(t, len(rewards))) for t in range(len(rewards))]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 17, 2, 64, 33], [], [0, 0], [5, 5]])
def test_returns_equal_slow_code(lengths: list[int], gamma: float) -> None:
    source = torch.Generator().manual_seed(0)
    rewards_T = torch.randn(sum(lengths), dtype=torch.float64, generator=source)
    offsets = slow.offsets_of(lengths)
    expected = [x for sample in slow.samples(rewards_T, offsets) for x in slow_returns(sample.tolist(), gamma)]
    got = returns_to_go(rewards_T, offsets, gamma=gamma)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_turns_by_hand() -> None:
    """Two samples: turns of 2, 1 and 1 tokens with rewards 1, 2, 4; one turn of 2 tokens with reward 8. gamma 0.5.

    Returns of turns: 1 + 0.5 (2 + 0.5 * 4) = 3, 2 + 0.5 * 4 = 4, 4 | 8.
    """
    turns, offsets = torch.tensor([0, 2, 3, 4, 6]), torch.tensor([0, 4, 6])
    got = turn_returns(torch.tensor([1.0, 2.0, 4.0, 8.0]), turns, offsets, gamma=0.5)
    assert got.tolist() == [3.0, 3.0, 4.0, 4.0, 8.0, 8.0]
    one_each = turn_returns(torch.tensor([8.0, 5.0]), offsets, offsets, gamma=0.5)
    assert one_each.tolist() == [8.0] * 4 + [5.0] * 2, "a turn a sample: the score on each token"


def test_turns_of_one_token_are_returns_of_tokens() -> None:
    rewards_T = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 4, 4, 9])
    got = turn_returns(rewards_T, torch.arange(10), offsets, gamma=0.7)
    torch.testing.assert_close(got, returns_to_go(rewards_T, offsets, gamma=0.7))


def test_turns_of_no_samples() -> None:
    start = torch.zeros(1, dtype=torch.int64)
    assert turn_returns(torch.zeros(0), start, start, gamma=1.0).shape == (0,)


def test_turns_refused() -> None:
    two = torch.zeros(2)
    with pytest.raises(ShapeMismatch, match="a sample ends at token 3, in the midst of a turn"):
        turn_returns(two, torch.tensor([0, 2, 4]), torch.tensor([0, 3, 4]), gamma=1.0)
    with pytest.raises(ShapeMismatch, match="turn 1 of the batch has no token"):
        turn_returns(two, torch.tensor([0, 2, 2]), torch.tensor([0, 2]), gamma=1.0)
    with pytest.raises(ShapeMismatch, match="must rise from 0 to the 4 tokens"):
        turn_returns(two, torch.tensor([0, 2, 4]), torch.tensor([0, 5]), gamma=1.0)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        turn_returns(torch.zeros(3), torch.tensor([0, 2, 4]), torch.tensor([0, 4]), gamma=1.0)


# ---- REINFORCE++


def test_reinforce_plus_plus_by_hand() -> None:
    """Rewards 0, 2 | 4, gamma 1: returns 2, 2, 4, mean 8 / 3, biased variance 8 / 9, so -0.7071, -0.7071, 1.4142."""
    got = reinforce_plus_plus(torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([0, 2, 3]))
    root = math.sqrt(0.5)
    assert got.tolist() == pytest.approx([-root, -root, 2 * root], abs=1e-7)


def test_reinforce_plus_plus_equals_slow_code() -> None:
    lengths = [3, 1, 8, 2]
    rewards_T = torch.randn(14, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    offsets = slow.offsets_of(lengths)
    returns = [x for sample in slow.samples(rewards_T, offsets) for x in slow_returns(sample.tolist(), 0.9)]
    got = reinforce_plus_plus(rewards_T, offsets, gamma=0.9)
    torch.testing.assert_close(got, torch.tensor(slow.whiten(returns), dtype=torch.float64))


def test_reinforce_plus_plus_baseline_equals_slow_code() -> None:
    scores_N, ids_N = random_scores()
    lengths = [1 + (7 * row) % 5 for row in range(len(ids_N))]
    centred = slow_by_group("dr_grpo", scores_N.tolist(), ids_N.tolist())
    tokens = [number for number, length in zip(centred, lengths, strict=True) for _ in range(length)]
    got = reinforce_plus_plus_baseline(scores_N, ids_N, slow.offsets_of(lengths))
    torch.testing.assert_close(got, torch.tensor(slow.whiten(tokens), dtype=torch.float64))
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        reinforce_plus_plus_baseline(scores_N, ids_N, torch.tensor([0, 3]))


def test_reinforce_plus_plus_of_nothing_and_of_no_signal() -> None:
    start = torch.zeros(1, dtype=torch.int64)
    assert reinforce_plus_plus(torch.zeros(0), start).shape == (0,)
    assert reinforce_plus_plus_baseline(torch.zeros(0), start[:0], start).shape == (0,)
    same = reinforce_plus_plus_baseline(torch.full((3,), 0.1), torch.tensor([1, 1, 1]), torch.tensor([0, 2, 3, 9]))
    assert same.tolist() == [0.0] * 9


def test_inputs_stay_as_they_are() -> None:
    scores_N, ids_N = random_scores()
    before = (scores_N.clone(), ids_N.clone())
    for estimator in (*BY_GROUP, groups_without_signal):
        estimator(scores_N, ids_N)
    assert torch.equal(scores_N, before[0]) and torch.equal(ids_N, before[1])
