"""Policy losses: values by hand, slow code with its gradients, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.loss_terms import sequence_mean_weights, token_mean_weights
from algorithms.losses import Loss, clipped_policy_loss
from algorithms.packed import spread
from algorithms.policy_losses import (
    cispo_loss,
    clip_higher_loss,
    dual_clip_loss,
    gspo_loss,
    gspo_token_loss,
    reinforce_loss,
)
from tests.algorithms import slow

LENGTHS = [9, 1, 14, 6, 20, 10]
NUM_TOKENS = sum(LENGTHS)
LOW, HIGH, DUAL = 0.2, 0.28, 1.6


@dataclass(frozen=True)
class Batch:
    """Whole samples, each part (T,)."""

    policy_T: Tensor
    behaviour_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor
    lengths: tuple[int, ...]

    @property
    def offsets(self) -> Tensor:
        return slow.offsets_of(list(self.lengths))

    def rows(self, rows: list[int]) -> Batch:
        bounds = self.offsets.tolist()
        tokens = torch.tensor([t for row in rows for t in range(bounds[row], bounds[row + 1])], dtype=torch.int64)
        return Batch(
            self.policy_T[tokens],
            self.behaviour_T[tokens],
            self.advantages_T[tokens],
            self.weights_T[tokens],
            tuple(self.lengths[row] for row in rows),
        )


def random_batch(seed: int = 0) -> Batch:
    """Ratios on both sides of every bound, for tokens and for means of samples; a sample of weight 0."""
    source = torch.Generator().manual_seed(seed)
    policy_T, noise_T, advantages_T, weights_T = (
        torch.randn(NUM_TOKENS, dtype=torch.float64, generator=source) for _ in range(4)
    )
    shifts_T = spread(torch.tensor([0.5, -0.5, 0.0, 0.6, -0.4, 0.02], dtype=torch.float64), slow.offsets_of(LENGTHS))
    weights_T = weights_T.abs()
    weights_T[9:12] = 0
    return Batch(policy_T, policy_T + 0.4 * noise_T - shifts_T, advantages_T, weights_T, tuple(LENGTHS))


def evaluate(name: str, batch: Batch, denominator: float = NUM_TOKENS) -> Loss:
    first = (batch.policy_T, batch.behaviour_T, batch.advantages_T)
    rest: dict[str, Any] = {"weights_T": batch.weights_T, "denominator": denominator}
    bounded = {"clip_low": LOW, "clip_high": HIGH, **rest}
    if name == "clip_higher":
        return clip_higher_loss(*first, **bounded)
    if name == "dual_clip":
        return dual_clip_loss(*first, clip_dual=DUAL, **bounded)
    if name == "gspo":
        return gspo_loss(*first, batch.offsets, **bounded)
    if name == "gspo_token":
        return gspo_token_loss(*first, batch.offsets, **bounded)
    if name == "cispo":
        return cispo_loss(*first, **bounded)
    return reinforce_loss(*first, **rest)


NAMES = ["clip_higher", "dual_clip", "gspo", "gspo_token", "cispo", "reinforce"]


def with_gradient(name: str, batch: Batch, denominator: float = NUM_TOKENS) -> tuple[float, Tensor, dict[str, float]]:
    policy_T = batch.policy_T.clone().requires_grad_()
    loss, metrics = evaluate(name, replace(batch, policy_T=policy_T), denominator)
    assert not any(metric.requires_grad for metric in metrics.values())
    assert all(metric.shape == () for metric in metrics.values())
    (gradient,) = torch.autograd.grad(loss, policy_T)
    return float(loss.detach()), gradient, {key: float(metric) for key, metric in metrics.items()}


# ---- slow code: single numbers, math.exp, and comparisons


def slow_clipped(ratio: float, advantage: float) -> tuple[float, bool, bool]:
    """Objective of one token, and whether the lower or the upper bound holds it."""
    if advantage > 0 and ratio > 1 + HIGH:
        return (1 + HIGH) * advantage, False, True
    if advantage < 0 and ratio < 1 - LOW:
        return (1 - LOW) * advantage, True, False
    return ratio * advantage, False, False


def slow_loss(name: str, batch: Batch) -> tuple[float, list[float], dict[str, float]]:
    """Loss, its derivative by each log-prob worked out on paper, and metrics."""
    bounds = batch.offsets.tolist()
    loss, gradient = 0.0, [0.0] * bounds[-1]
    sums = dict.fromkeys(("ratio", "clip_fraction_low", "clip_fraction_high", "approx_kl"), 0.0)
    if name == "dual_clip":
        sums["clip_fraction_dual"] = 0.0
    for begin, end in pairwise(bounds):
        tokens = range(begin, end)
        gaps = [float(batch.policy_T[t] - batch.behaviour_T[t]) for t in tokens]
        sequence = math.exp(sum(gaps) / max(len(gaps), 1))
        for t, gap in zip(tokens, gaps, strict=True):
            advantage, weight = float(batch.advantages_T[t]), float(batch.weights_T[t])
            ratio = sequence if name.startswith("gspo") else math.exp(gap)
            sums["ratio"] += ratio
            sums["approx_kl"] += math.exp(gap) - 1 - gap
            low = high = False
            if name == "reinforce":
                value, slope = float(batch.policy_T[t]) * advantage, advantage
            elif name == "cispo":
                low, high = ratio < 1 - LOW, ratio > 1 + HIGH
                slope = min(max(ratio, 1 - LOW), 1 + HIGH) * advantage
                value = slope * float(batch.policy_T[t])
            else:
                value, low, high = slow_clipped(ratio, advantage)
                slope = 0.0 if low or high else ratio * advantage
                if name == "dual_clip" and advantage < 0 and ratio > DUAL:
                    value, slope = DUAL * advantage, 0.0
                    sums["clip_fraction_dual"] += 1
            loss -= weight * value / NUM_TOKENS
            for u in tokens if name == "gspo" else [t]:
                gradient[u] -= weight * slope / (len(tokens) if name == "gspo" else 1) / NUM_TOKENS
            sums["clip_fraction_low"] += low
            sums["clip_fraction_high"] += high
    return loss, gradient, {"policy_loss": loss, **{key: number / NUM_TOKENS for key, number in sums.items()}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_slow_code(name: str, seed: int) -> None:
    batch = random_batch(seed)
    loss, gradient, metrics = with_gradient(name, batch)
    expected_loss, expected_gradient, expected_metrics = slow_loss(name, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(expected_gradient, dtype=torch.float64))
    assert metrics == pytest.approx(expected_metrics, rel=1e-10)
    if name != "reinforce":
        clips = [number for key, number in metrics.items() if key.startswith("clip_fraction")]
        assert all(0 < clip < 1 for clip in clips), "the inputs reach what they are to test"


# ---- by hand


def tokens(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def by_hand(name: str, ratios: Tensor, advantages_T: Tensor, **changes: Any) -> tuple[float, list[float], Any]:
    """All log-probs -1, denominator 4."""
    policy_T = torch.full_like(ratios, -1.0)
    lengths = changes.pop("lengths", (len(ratios),))
    batch = Batch(policy_T, -1 - ratios.log(), advantages_T, token_mean_weights(ratios), lengths)
    loss, gradient, metrics = with_gradient(name, replace(batch, **changes), denominator=4)
    return loss, gradient.tolist(), metrics


def test_clip_higher_by_hand() -> None:
    """Bounds 0.8 and 1.28.

    1.25, A 2: inside of 1.28: 2.5.   1.5, A 2: 2.56, no gradient.   0.7, A -2: -1.6, no gradient.   0.7, A 2: 1.4.
    Loss -(2.5 + 2.56 - 1.6 + 1.4) / 4 = -1.215; gradient -2.5 / 4, 0, 0, -1.4 / 4.
    """
    loss, gradient, metrics = by_hand("clip_higher", tokens(1.25, 1.5, 0.7, 0.7), tokens(2, 2, -2, 2))
    assert loss == pytest.approx(-1.215)
    assert gradient == pytest.approx([-0.625, 0, 0, -0.35])
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == (0.25, 0.25)
    assert metrics["ratio"] == pytest.approx(4.15 / 4)


def test_dual_clip_by_hand() -> None:
    """c 1.6. 3, A -2: -6 is bounded to -3.2, no gradient.   1.5, A -2: -3.   3, A 2: 2.56.   0.7, A -2: -1.6."""
    loss, gradient, metrics = by_hand("dual_clip", tokens(3, 1.5, 3, 0.7), tokens(-2, -2, 2, -2))
    assert loss == pytest.approx((3.2 + 3 - 2.56 + 1.6) / 4)
    assert gradient == pytest.approx([0, 0.75, 0, 0])
    fractions = [metrics[f"clip_fraction_{which}"] for which in ("low", "high", "dual")]
    assert fractions == [0.25, 0.25, 0.25]


def test_gspo_by_hand() -> None:
    """Two samples of two tokens, ratios 2 and 0.5 (s 1), 4 and 1 (s 2); A 2 and 3; weights 1.

    First: 2 * 1 for each token. Second: 3 * 1.28, no gradient. Loss -(4 + 7.68) / 4 = -2.92.
    Gradient of the first: two tokens of s A = 2, each moved by half of each log-prob: -(2 * 2 * 0.5) / 4 = -0.5.
    """
    loss, gradient, metrics = by_hand("gspo", tokens(2, 0.5, 4, 1), tokens(2, 2, 3, 3), lengths=(2, 2))
    assert loss == pytest.approx(-2.92)
    assert gradient == pytest.approx([-0.5, -0.5, 0, 0])
    assert metrics["ratio"] == pytest.approx(1.5)
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == (0, 0.5)


def test_cispo_by_hand() -> None:
    """Weights 1.28, 0.8, 1.1, 1.28 and log-prob -1: loss 1 * (1.28 * 2 - 0.8 * 2 + 1.1 * 3 - 1.28 * 1) / 4."""
    loss, gradient, metrics = by_hand("cispo", tokens(3, 0.5, 1.1, 2), tokens(2, -2, 3, -1))
    assert loss == pytest.approx((2.56 - 1.6 + 3.3 - 1.28) / 4)
    assert gradient == pytest.approx([-0.64, 0.4, -0.825, 0.32]), "every token has a gradient"
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == (0.25, 0.5)


def test_reinforce_by_hand() -> None:
    loss, gradient, metrics = by_hand("reinforce", tokens(3, 0.5, 1, 1), tokens(2, -2, 3, 0))
    assert loss == pytest.approx(3 / 4)
    assert gradient == pytest.approx([-0.5, 0.5, -0.75, 0])
    assert metrics["ratio"] == pytest.approx(5.5 / 4)


# ---- relations between them


def test_equal_bounds_are_ppo() -> None:
    batch = random_batch()
    first = (batch.policy_T, batch.behaviour_T, batch.advantages_T)
    ones_T = token_mean_weights(batch.policy_T)
    ppo, ppo_metrics = clipped_policy_loss(*first, clip_ratio=0.2, denominator=NUM_TOKENS)
    loss, metrics = clip_higher_loss(*first, clip_low=0.2, clip_high=0.2, weights_T=ones_T, denominator=NUM_TOKENS)
    assert torch.equal(loss, ppo)
    assert metrics["clip_fraction_low"] + metrics["clip_fraction_high"] == pytest.approx(ppo_metrics["clip_fraction"])
    torch.testing.assert_close(metrics["approx_kl"], ppo_metrics["approx_kl"])
    # A bound that nothing reaches is none.
    dual, _ = dual_clip_loss(
        *first, clip_low=0.2, clip_high=0.2, clip_dual=1e6, weights_T=ones_T, denominator=NUM_TOKENS
    )
    assert torch.equal(dual, ppo)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_all_have_the_gradient_of_reinforce(name: str) -> None:
    """Ratio 1, nothing clipped, KL 0; GSPO's advantages and weights being equal within a sample."""
    batch = random_batch()
    by_sample = [spread(part[: len(LENGTHS)], batch.offsets) for part in (batch.advantages_T, batch.weights_T)]
    batch = replace(batch, behaviour_T=batch.policy_T, advantages_T=by_sample[0], weights_T=by_sample[1])
    _, gradient, metrics = with_gradient(name, batch)
    torch.testing.assert_close(gradient, -batch.weights_T * batch.advantages_T / NUM_TOKENS)
    assert metrics["ratio"] == pytest.approx(1)
    assert all(number == 0 for key, number in metrics.items() if key not in ("ratio", "policy_loss"))


def test_gspo_token_is_gspo_where_advantages_are_equal() -> None:
    batch = random_batch()
    advantages_T = spread(batch.advantages_T[: len(LENGTHS)], batch.offsets)
    weights_T = sequence_mean_weights(batch.policy_T, batch.offsets, num_tokens=NUM_TOKENS, num_samples=len(LENGTHS))
    batch = replace(batch, advantages_T=advantages_T, weights_T=weights_T)
    loss, gradient, metrics = with_gradient("gspo", batch)
    other_loss, other_gradient, other_metrics = with_gradient("gspo_token", batch)
    assert other_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(other_gradient, gradient)
    assert other_metrics == pytest.approx(metrics)


def test_gspo_with_sequence_weights_is_the_papers_objective() -> None:
    """Mean over samples of min(s A, clip(s) A)."""
    batch = random_batch()
    advantages_N = batch.advantages_T[: len(LENGTHS)]
    weights_T = sequence_mean_weights(batch.policy_T, batch.offsets, num_tokens=NUM_TOKENS, num_samples=len(LENGTHS))
    loss, _, _ = with_gradient(
        "gspo", replace(batch, advantages_T=spread(advantages_N, batch.offsets), weights_T=weights_T)
    )
    gaps = slow.samples(batch.policy_T - batch.behaviour_T, batch.offsets)
    objectives = [
        slow_clipped(math.exp(float(gap.mean())), float(advantage))[0]
        for gap, advantage in zip(gaps, advantages_N, strict=True)
    ]
    assert loss == pytest.approx(-sum(objectives) / len(LENGTHS))


# ---- what must not matter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[0], [], [1, 2, 3, 4], [5]], [[5, 3], [1], [0, 2, 4], []]])
def test_neither_cut_nor_order_matters(name: str, parts: list[list[int]]) -> None:
    """Micro-batches and ranks of whole samples, some of them empty, each divided by the global denominator."""
    batch = random_batch()
    loss, gradient, metrics = with_gradient(name, batch)
    results = [with_gradient(name, batch.rows(part)) for part in parts]
    assert sum(result[0] for result in results) == pytest.approx(loss, rel=1e-10)
    for key, number in metrics.items():
        assert sum(result[2][key] for result in results) == pytest.approx(number, rel=1e-10)
    whole = slow.samples(gradient, batch.offsets)
    for part, result in zip(parts, results, strict=True):
        expected = [whole[row] for row in part]
        torch.testing.assert_close(result[1], torch.cat(expected) if expected else gradient[:0])


@pytest.mark.parametrize("name", ["clip_higher", "dual_clip", "gspo"])
def test_finite_differences(name: str) -> None:
    """Not of those whose gradient is, by intention, not that of their value."""
    batch = random_batch().rows([1, 3])
    policy_T = batch.policy_T.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: evaluate(name, replace(batch, policy_T=x))[0], (policy_T,))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_into_the_policy_alone(name: str) -> None:
    batch = random_batch()
    parts = [batch.policy_T, batch.behaviour_T, batch.advantages_T, batch.weights_T]
    for part in parts:
        part.requires_grad_()
    loss, _ = evaluate(name, batch)
    gradients = torch.autograd.grad(loss, parts, allow_unused=True)
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [True, False, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_nothing(name: str) -> None:
    """A rank without work gives zeros."""
    loss, gradient, metrics = with_gradient(name, random_batch().rows([]))
    assert loss == 0 and gradient.shape == (0,)
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gap", [-1000.0, 90.0, 1000.0])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_extreme_ratios_are_finite(name: str, gap: float, weight: float) -> None:
    """In float32 e^90 overflows; 0 times it would be NaN, in the value where A is 0 and in the gradient where not."""
    policy_T = torch.full((3,), -2.0)
    batch = Batch(policy_T, policy_T - gap, torch.tensor([1.0, 0.0, -1.0]), torch.full((3,), weight), (1, 1, 1))
    loss, gradient, metrics = with_gradient(name, batch)
    assert math.isfinite(loss) and all(math.isfinite(number) for number in metrics.values())
    assert bool(gradient.isfinite().all())
    assert gradient[1] == 0


def test_a_token_of_weight_zero_adds_nothing() -> None:
    batch = random_batch()
    loss, _, _ = with_gradient("clip_higher", batch)
    batch.behaviour_T[9:12] -= 500
    batch.advantages_T[9:12] = 1e9
    changed, gradient, _ = with_gradient("clip_higher", batch)
    assert changed == loss
    assert gradient[9:12].tolist() == [0.0] * 3


# ---- refusals


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["policy_T", "behaviour_T", "advantages_T", "weights_T"])
def test_refuses_what_would_broadcast(name: str, part: str) -> None:
    batch = random_batch()
    for wrong in (getattr(batch, part)[:, None], getattr(batch, part)[:1]):
        with pytest.raises(ShapeMismatch):
            evaluate(name, replace(batch, **{part: wrong}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("denominator", [0, -1, float("nan")])
def test_refuses_impossible_denominators(name: str, denominator: float) -> None:
    with pytest.raises(AlgorithmError, match="a loss is divided by"):
        evaluate(name, random_batch(), denominator)


@pytest.mark.parametrize("function", [clip_higher_loss, dual_clip_loss, cispo_loss])
@pytest.mark.parametrize("bounds", [(-0.1, 0.2), (0.2, -0.1), (math.nan, 0.2)])
def test_refuses_bounds_that_make_no_sense(function: Callable[..., Loss], bounds: tuple[float, float]) -> None:
    one = torch.zeros(1)
    low, high = bounds
    with pytest.raises(AlgorithmError, match="both must be 0 or more"):
        function(one, one, one, clip_low=low, clip_high=high, weights_T=one, denominator=1)


def test_refuses_a_dual_bound_below_one() -> None:
    one = torch.zeros(1)
    with pytest.raises(AlgorithmError, match="clip_dual is 1"):
        dual_clip_loss(one, one, one, clip_low=0.2, clip_high=0.2, clip_dual=1.0, weights_T=one, denominator=1)


@pytest.mark.parametrize("function", [gspo_loss, gspo_token_loss])
def test_refuses_offsets_that_do_not_cover(function: Callable[..., Loss]) -> None:
    two = torch.zeros(2)
    with pytest.raises(ShapeMismatch, match="must rise from 0 to the 2 tokens"):
        function(two, two, two, torch.tensor([0, 1]), clip_low=0.2, clip_high=0.2, weights_T=two, denominator=1)
