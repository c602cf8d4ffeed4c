"""Weights for tokens of another policy: values by hand, slow code, and what must not matter."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.corrections import (
    Weights,
    decoupled_policy_loss,
    masked_weights,
    sequence_masked_weights,
    truncated_weights,
)
from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.loss_terms import token_mean_weights
from algorithms.losses import Loss
from algorithms.policy_losses import clip_higher_loss, reinforce_loss
from tests.algorithms import slow

LENGTHS = [5, 1, 9, 2, 13]
NUM_TOKENS = sum(LENGTHS)
OFFSETS = slow.offsets_of(LENGTHS)
NAMES = ["truncated", "masked", "sequence_masked"]


def random_tokens(count: int, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(NUM_TOKENS, dtype=torch.float64, generator=source) for _ in range(count)]


def evaluate(name: str, proximal_T: Tensor, rollout_T: Tensor, offsets: Tensor, denominator: float) -> Weights:
    if name == "truncated":
        return truncated_weights(proximal_T, rollout_T, cap=2.0, denominator=denominator)
    if name == "masked":
        return masked_weights(proximal_T, rollout_T, low=0.5, high=2.0, denominator=denominator)
    return sequence_masked_weights(
        proximal_T, rollout_T, offsets, low=0.8, high=1.25, cap=2.0, denominator=denominator
    )


def slow_weights(name: str, proximal: list[float], rollout: list[float]) -> tuple[list[float], list[bool]]:
    """One sample's weights, and which are touched."""
    ratios = [math.exp(p - q) for p, q in zip(proximal, rollout, strict=True)]
    if name == "truncated":
        return [2.0 if k > 2 else k for k in ratios], [k > 2 for k in ratios]
    if name == "masked":
        return [k if 0.5 <= k <= 2 else 0.0 for k in ratios], [not 0.5 <= k <= 2 for k in ratios]
    product = 1.0
    for k in ratios:
        product *= k
    inside = 0.8 <= product ** (1 / len(ratios)) <= 1.25
    return [min(k, 2.0) if inside else 0.0 for k in ratios], [k > 2 or not inside for k in ratios]


def test_by_hand() -> None:
    """k 0.4, 1.5, 4 | 0.6, 2.5: geometric means 2.4^(1/3) = 1.34, outside of 0.8 to 1.25, and 1.5^(1/2) = 1.22."""
    k_T = torch.tensor([0.4, 1.5, 4.0, 0.6, 2.5], dtype=torch.float64)
    rollout_T = torch.full_like(k_T, -1)
    proximal_T, offsets = rollout_T + k_T.log(), torch.tensor([0, 3, 5])
    kl = sum(k - 1 - math.log(k) for k in k_T.tolist()) / 5
    expected = {
        "truncated": ([0.4, 1.5, 2.0, 0.6, 2.0], 0.4),
        "masked": ([0.0, 1.5, 0.0, 0.6, 0.0], 0.6),
        "sequence_masked": ([0.0, 0.0, 0.0, 0.6, 2.0], 0.8),
    }
    for name, (weights, fraction) in expected.items():
        got_T, metrics = evaluate(name, proximal_T, rollout_T, offsets, 5)
        assert got_T.tolist() == pytest.approx(weights)
        wanted = {"correction_fraction": fraction, "correction_weight": sum(weights) / 5, "correction_kl": kl}
        assert {key: float(metric) for key, metric in metrics.items()} == pytest.approx(wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_slow_code(name: str, seed: int) -> None:
    rollout_T, noise_T = random_tokens(2, seed)
    proximal_T = rollout_T + 0.8 * noise_T
    got_T, metrics = evaluate(name, proximal_T, rollout_T, OFFSETS, NUM_TOKENS)
    weights, touched = [], []
    for proximal, rollout in zip(slow.samples(proximal_T, OFFSETS), slow.samples(rollout_T, OFFSETS), strict=True):
        some, which = slow_weights(name, proximal.tolist(), rollout.tolist())
        weights += some
        touched += which
    torch.testing.assert_close(got_T, torch.tensor(weights, dtype=torch.float64))
    assert float(metrics["correction_fraction"]) == pytest.approx(sum(touched) / NUM_TOKENS)
    assert 0 < sum(touched) < NUM_TOKENS, "the inputs reach what they are to test"
    assert float(metrics["correction_weight"]) == pytest.approx(sum(weights) / NUM_TOKENS)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_touched_where_the_two_agree(name: str) -> None:
    (rollout_T,) = random_tokens(1)
    got_T, metrics = evaluate(name, rollout_T.clone(), rollout_T, OFFSETS, NUM_TOKENS)
    assert got_T.tolist() == [1.0] * NUM_TOKENS
    assert float(metrics["correction_fraction"]) == float(metrics["correction_kl"]) == 0
    assert float(metrics["correction_weight"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_neither_cut_nor_order_matters(name: str) -> None:
    rollout_T, noise_T = random_tokens(2)
    proximal_T = rollout_T + 0.8 * noise_T
    whole_T, metrics = evaluate(name, proximal_T, rollout_T, OFFSETS, NUM_TOKENS)
    for bounds in ([0, 2, 2, 5], [0, 1, 4, 5]):
        parts = []
        for first, last in pairwise(bounds):
            a, b = int(OFFSETS[first]), int(OFFSETS[last])
            parts.append(evaluate(name, proximal_T[a:b], rollout_T[a:b], OFFSETS[first : last + 1] - a, NUM_TOKENS))
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole_T, rtol=0, atol=0)
        for key, metric in metrics.items():
            assert sum(float(part[1][key]) for part in parts) == pytest.approx(float(metric))
    order = [4, 0, 2, 1, 3]
    proximal, rollout, weights = (slow.samples(part, OFFSETS) for part in (proximal_T, rollout_T, whole_T))
    moved = slow.offsets_of([LENGTHS[row] for row in order])
    got_T, _ = evaluate(
        name, torch.cat([proximal[r] for r in order]), torch.cat([rollout[r] for r in order]), moved, NUM_TOKENS
    )
    assert torch.equal(got_T, torch.cat([weights[row] for row in order]))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_numbers(name: str) -> None:
    proximal_T, rollout_T = (tensor.requires_grad_() for tensor in random_tokens(2))
    weights_T, metrics = evaluate(name, proximal_T, rollout_T, OFFSETS, NUM_TOKENS)
    assert not weights_T.requires_grad
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios(name: str) -> None:
    """k of e^1000, of 0, of NaN, each a sample of its own, in float32."""
    rollout_T = torch.zeros(3)
    proximal_T = torch.tensor([1000.0, -torch.inf, torch.nan])
    weights_T, _ = evaluate(name, proximal_T, rollout_T, torch.tensor([0, 1, 2, 3]), 3)
    assert weights_T.tolist()[:2] == ([2.0, 0.0] if name == "truncated" else [0.0, 0.0])
    assert math.isnan(float(weights_T[2])), "a NaN is not taken for a token that is out of bounds"
    _, metrics = evaluate(name, proximal_T[:1], rollout_T[:1], torch.tensor([0, 1]), 1)
    assert all(bool(metric.isfinite()) for metric in metrics.values())


def test_one_token_far_off_counts_in_full_for_its_sample() -> None:
    """A log ratio of 40 over 60 tokens is a mean of 2/3, outside of ln 1.4; cut at 20 it would be inside."""
    proximal_T = torch.zeros(60)
    proximal_T[7] = 40
    weights_T, _ = sequence_masked_weights(
        proximal_T, torch.zeros(60), torch.tensor([0, 60]), low=0.7, high=1.4, cap=2.0, denominator=60
    )
    assert weights_T.tolist() == [0.0] * 60


def test_a_nan_spoils_its_sample_and_no_other() -> None:
    proximal_T = torch.tensor([0.0, torch.nan, 0.1, 0.0])
    weights_T, _ = sequence_masked_weights(
        proximal_T, torch.zeros(4), torch.tensor([0, 2, 4]), low=0.9, high=1.2, cap=2.0, denominator=4
    )
    assert weights_T.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_and_refusals(name: str) -> None:
    none, start = torch.zeros(0), torch.zeros(1, dtype=torch.int64)
    weights_T, metrics = evaluate(name, none, none, start, 5)
    assert weights_T.shape == (0,) and {float(metric) for metric in metrics.values()} == {0.0}
    two, offsets = torch.zeros(2), torch.tensor([0, 2])
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        evaluate(name, two, two[:, None], offsets, 5)
    with pytest.raises(AlgorithmError, match="a loss is divided by 0"):
        evaluate(name, two, two, offsets, 0)


def test_bounds_refused() -> None:
    two, offsets = torch.zeros(2), torch.tensor([0, 2])
    with pytest.raises(AlgorithmError, match="a cap is above 0"):
        truncated_weights(two, two, cap=0.0, denominator=1)
    with pytest.raises(AlgorithmError, match="a cap is above 0"):
        sequence_masked_weights(two, two, offsets, low=0.5, high=2.0, cap=0.0, denominator=1)
    for low, high in ((2.0, 0.5), (-1.0, 2.0), (math.nan, 1.0)):
        with pytest.raises(AlgorithmError, match="the bounds must rise, from 0 or more"):
            masked_weights(two, two, low=low, high=high, denominator=1)
        with pytest.raises(AlgorithmError, match="the bounds must rise, from 0 or more"):
            sequence_masked_weights(two, two, offsets, low=low, high=high, cap=2.0, denominator=1)
    with pytest.raises(ShapeMismatch, match="must rise from 0 to the 2 tokens"):
        sequence_masked_weights(two, two, torch.tensor([0, 1]), low=0.5, high=2.0, cap=2.0, denominator=1)


def weigh_all(name: str, policy: Tensor, rollout: Tensor) -> Weights:
    """Each action a sample of one token; neither cap nor bounds are reached."""
    if name == "truncated":
        return truncated_weights(policy, rollout, cap=100.0, denominator=1)
    if name == "masked":
        return masked_weights(policy, rollout, low=0.0, high=100.0, denominator=1)
    offsets = torch.arange(len(policy) + 1)
    return sequence_masked_weights(policy, rollout, offsets, low=0.0, high=100.0, cap=100.0, denominator=1)


@pytest.mark.parametrize("name", NAMES)
def test_importance_weights_make_the_gradient_that_of_the_policy(name: str) -> None:
    """Over all actions, as often as another policy draws them: E_q[k A grad log p]."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    rollout = torch.tensor([0.1, 0.5, -0.3], dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (expected,) = torch.autograd.grad(-(policy.exp() * rewards).sum(), logits, retain_graph=True)
    weights, metrics = weigh_all(name, policy, rollout)
    loss, _ = reinforce_loss(policy, policy.detach(), rewards, weights_T=weights * rollout.exp(), denominator=1)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    assert float(metrics["correction_fraction"]) == 0


# ---- decoupled PPO


def decoupled(policy_T: Tensor, proximal_T: Tensor, rollout_T: Tensor, advantages_T: Tensor, **changes: Any) -> Loss:
    settings = {"cap": 2.0, "weights_T": token_mean_weights(policy_T), "denominator": NUM_TOKENS}
    return decoupled_policy_loss(
        policy_T, proximal_T, rollout_T, advantages_T, clip_low=0.2, clip_high=0.28, **{**settings, **changes}
    )


def test_decoupled_by_hand() -> None:
    """u 1.5, A 2, k 0.5: 0.5 * 2.56.   u 1.1, A -1, k 1.99: 1.99 * -1.1.   u 1, A 3, k 4, above the cap: left out."""
    proximal_T = torch.full((3,), -1.0, dtype=torch.float64)
    u_T, k_T = torch.tensor([1.5, 1.1, 1.0]).double(), torch.tensor([0.5, 1.99, 4.0]).double()
    policy_T = (proximal_T + u_T.log()).requires_grad_()
    advantages_T = torch.tensor([2.0, -1.0, 3.0]).double()
    loss, metrics = decoupled(policy_T, proximal_T, proximal_T - k_T.log(), advantages_T, denominator=3)
    assert float(loss.detach()) == pytest.approx(-(0.5 * 2.56 - 1.99 * 1.1) / 3)
    assert torch.autograd.grad(loss, policy_T)[0].tolist() == pytest.approx([0, 1.99 * 1.1 / 3, 0])
    assert float(metrics["correction_fraction"]) == pytest.approx(1 / 3)
    assert float(metrics["clip_fraction_high"]) == pytest.approx(1 / 3)
    assert float(metrics["ratio"]) == pytest.approx(1.2), "against the proximal policy"


def test_decoupled_equals_slow_code() -> None:
    proximal_T, first_T, second_T, advantages_T = random_tokens(4)
    policy_T, rollout_T = (proximal_T + 0.4 * first_T).requires_grad_(), proximal_T + 0.5 * second_T
    loss, _ = decoupled(policy_T, proximal_T, rollout_T, advantages_T)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(NUM_TOKENS):
        k = math.exp(float(proximal_T[t] - rollout_T[t]))
        u, advantage = (policy_T[t] - proximal_T[t]).exp(), float(advantages_T[t])
        bounded = min(max(float(u.detach()), 0.8), 1.28)
        value = u * advantage if float(u.detach()) * advantage <= bounded * advantage else bounded * advantage
        total = total - (k if k <= 2 else 0.0) * value / NUM_TOKENS
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(torch.autograd.grad(loss, policy_T)[0], torch.autograd.grad(total, policy_T)[0])


def test_decoupled_without_staleness_is_ppo() -> None:
    proximal_T, noise_T, advantages_T = random_tokens(3)
    policy_T = proximal_T + 0.4 * noise_T
    loss, _ = decoupled(policy_T, proximal_T, proximal_T.clone(), advantages_T)
    expected, _ = clip_higher_loss(
        policy_T,
        proximal_T,
        advantages_T,
        clip_low=0.2,
        clip_high=0.28,
        weights_T=token_mean_weights(policy_T),
        denominator=NUM_TOKENS,
    )
    assert torch.equal(loss, expected)


def test_decoupled_moves_the_policy_alone() -> None:
    parts = [tensor.requires_grad_() for tensor in random_tokens(4)]
    loss, _ = decoupled(*parts)
    gradients = torch.autograd.grad(loss, parts, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True, False, False, False]


def test_decoupled_of_nothing_and_refusals() -> None:
    none = torch.zeros(0, requires_grad=True)
    loss, metrics = decoupled(none, none, none, none)
    assert float(loss.detach()) == 0 and {float(metric) for metric in metrics.values()} == {0.0}
    one, two = torch.zeros(1), torch.zeros(2)
    for wrong in ((two, one, one, one), (one, two, one, one), (one, one, two, one), (one, one, one, two)):
        with pytest.raises(ShapeMismatch):
            decoupled(*wrong)
    with pytest.raises(ShapeMismatch):
        decoupled(two, two, two, two, weights_T=one)
