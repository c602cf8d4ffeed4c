"""Losses: values by hand, slow code with its gradients, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.kl import k3
from algorithms.losses import Loss, clipped_policy_loss, clipped_value_loss, next_token_loss
from tests.algorithms import slow

NUM_TOKENS = 60


def random_tokens(count: int, seed: int = 0, num_tokens: int = NUM_TOKENS) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, dtype=torch.float64, generator=source) for _ in range(count)]


def policy_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and behaviour log-probs with ratios on both sides of the clip, advantages, entropies."""
    policy_T, noise_T, advantages_T, entropy_T = random_tokens(4)
    return policy_T, policy_T + 0.4 * noise_T, advantages_T, entropy_T.abs()


# ---- next token


def test_next_token_by_hand() -> None:
    """Log-probs -1, -2, -4; the middle one is not to be learnt: (1 + 4) / 2."""
    loss, metrics = next_token_loss(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1, 0, 1], dtype=torch.uint8), 2)
    assert float(loss) == float(metrics["nats_per_token"]) == 2.5


def test_next_token_ignores_what_is_masked() -> None:
    logprobs_T = torch.tensor([-1.0, -torch.inf, -3.0], requires_grad=True)
    loss, _ = next_token_loss(logprobs_T, torch.tensor([True, False, True]), 4)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 1.0
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == [-0.25, 0.0, -0.25]


# ---- policy


def test_policy_by_hand() -> None:
    """Clip 0.2, denominator 4, and one token for each corner of the objective.

    ratio 1.5, A 2: plain 3, clipped 2.4: min 2.4, no gradient.   ratio 1.5, A -2: min(-3, -2.4) = -3, gradient.
    ratio 0.5, A 2: min(1, 1.6) = 1, gradient.                    ratio 0.5, A -2: min(-1, -1.6) = -1.6, no gradient.
    The loss is -(2.4 - 3 + 1 - 1.6) / 4 = 0.3. d loss / d log-prob = -A ratio / 4, or 0: 0, 0.75, -0.25, 0.
    Ratios sum to 4, over 4: 1. Two of four are clipped: 0.5.
    approx_kl: (0.5 - ln 1.5) * 2 + (-0.5 + ln 2) * 2 = 0.189070 + 0.386294, over 4: 0.143841.
    """
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    policy_T = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    advantages_T = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    loss, metrics = clipped_policy_loss(policy_T, -1 - ratio.log(), advantages_T, clip_ratio=0.2, denominator=4)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(0.3)
    assert policy_T.grad is not None
    assert policy_T.grad.tolist() == pytest.approx([0.0, 0.75, -0.25, 0.0])
    expected = {"policy_loss": 0.3, "ratio": 1.0, "clip_fraction": 0.5, "approx_kl": 0.143841}
    assert {name: float(metric) for name, metric in metrics.items()} == pytest.approx(expected, abs=1e-6)


def test_first_minibatch_is_plain_policy_gradient() -> None:
    """Where the policy is the one that sampled: ratio 1, nothing clipped, KL 0, gradient -A / T (REINFORCE)."""
    policy_T, _, advantages_T, _ = policy_inputs()
    policy_T.requires_grad_()
    loss, metrics = clipped_policy_loss(
        policy_T, policy_T.detach().clone(), advantages_T, clip_ratio=0.2, denominator=NUM_TOKENS
    )
    torch.autograd.backward(loss)
    assert policy_T.grad is not None
    torch.testing.assert_close(policy_T.grad, -advantages_T / NUM_TOKENS)
    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-14)
    assert float(metrics["clip_fraction"]) == float(metrics["approx_kl"]) == 0.0


@pytest.mark.parametrize("clip", [0.2, 0.05, 10.0])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_policy_equals_slow_code(clip: float, coefficient: float) -> None:
    policy_T, behaviour_T, advantages_T, entropy_T = policy_inputs()
    policy_T.requires_grad_()
    entropy_T.requires_grad_()
    loss, metrics = clipped_policy_loss(
        policy_T,
        behaviour_T,
        advantages_T,
        clip_ratio=clip,
        denominator=NUM_TOKENS,
        entropy_T=entropy_T,
        entropy_coefficient=coefficient,
    )
    objectives = [
        slow.policy_objective(policy_T[t], float(behaviour_T[t]), float(advantages_T[t]), clip)
        for t in range(NUM_TOKENS)
    ]
    objective = torch.stack(objectives).sum()
    expected = -(objective + coefficient * entropy_T.sum()) / NUM_TOKENS
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, (policy_T, entropy_T), allow_unused=True),
        torch.autograd.grad(expected, (policy_T, entropy_T)),
        strict=True,
    ):
        torch.testing.assert_close(torch.zeros_like(wanted) if got is None else got, wanted)
    assert float(metrics["policy_loss"]) == pytest.approx(-objective.item() / NUM_TOKENS)
    assert float(metrics["entropy"]) == pytest.approx(entropy_T.mean().item())
    ratios = (policy_T - behaviour_T).exp().tolist()
    signs = advantages_T.tolist()
    num_clipped = sum((a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip) for r, a in zip(ratios, signs, strict=True))
    assert float(metrics["clip_fraction"]) == pytest.approx(num_clipped / NUM_TOKENS)
    assert (num_clipped > 0) == (clip < 1), "the inputs reach what they are to test"
    assert float(metrics["approx_kl"]) == pytest.approx(k3(behaviour_T, policy_T).mean().item())


def test_policy_refuses_a_bonus_of_no_entropy() -> None:
    one = torch.zeros(1)
    with pytest.raises(AlgorithmError, match="no entropy was given"):
        clipped_policy_loss(one, one, one, clip_ratio=0.2, denominator=1, entropy_coefficient=0.1)


# ---- value


def test_value_by_hand() -> None:
    """Clip 0.2, rollout values 0, denominator 4.

    V 0.5, R 1: errors 0.25 and (0.2 - 1)^2 = 0.64, the larger is clipped, no gradient.
    V 0.5, R 0: errors 0.25 and 0.04: plain, gradient 0.5.
    V 0.1, R 1: inside: 0.81 either way, gradient -0.9.
    V -0.5, R -1: errors 0.25 and 0.64, clipped, no gradient.
    Loss: 0.5 (0.64 + 0.25 + 0.81 + 0.64) / 4 = 0.2925. Gradients over 4. Clipped: 2 of 4. Mean value 0.15.
    """
    values_T = torch.tensor([0.5, 0.5, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    returns_T = torch.tensor([1.0, 0.0, 1.0, -1.0], dtype=torch.float64)
    loss, metrics = clipped_value_loss(values_T, torch.zeros_like(returns_T), returns_T, clip_value=0.2, denominator=4)
    torch.autograd.backward(loss)
    assert values_T.grad is not None
    assert values_T.grad.tolist() == pytest.approx([0.0, 0.125, -0.225, 0.0])
    expected = {"value_loss": 0.2925, "value_clip_fraction": 0.5, "value": 0.15}
    assert {name: float(metric) for name, metric in metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_value_equals_slow_code(clip: float | None) -> None:
    rollout_values_T, step_T, returns_T = random_tokens(3, seed=1)
    values_T = (rollout_values_T + 0.8 * step_T).requires_grad_()
    loss, metrics = clipped_value_loss(values_T, rollout_values_T, returns_T, clip_value=clip, denominator=NUM_TOKENS)
    errors = [
        slow.value_error(values_T[t], float(rollout_values_T[t]), float(returns_T[t]), clip) for t in range(NUM_TOKENS)
    ]
    expected = torch.stack(errors).sum() / NUM_TOKENS
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, values_T)[0], torch.autograd.grad(expected, values_T)[0])
    assert (float(metrics["value_clip_fraction"]) > 0) == (clip is not None)


def test_value_without_clip_is_half_the_mean_square() -> None:
    values_T, returns_T = random_tokens(2)
    loss, _ = clipped_value_loss(values_T, 100 + values_T, returns_T, clip_value=None, denominator=NUM_TOKENS)
    assert float(loss) == pytest.approx(0.5 * float(((values_T - returns_T) ** 2).mean()))


# ---- what all of them promise


def whole_and_part(name: str) -> tuple[list[Tensor], Callable[[list[Tensor]], Loss]]:
    """Inputs of a loss, what the gradient flows into first, and the loss with the global denominator."""
    if name == "next_token":
        logprobs_T, mask_T = random_tokens(2)
        return [logprobs_T, mask_T > 0], lambda x: next_token_loss(x[0], x[1], NUM_TOKENS)
    if name == "policy":
        policy_T, behaviour_T, advantages_T, entropy_T = policy_inputs()
        return [policy_T, behaviour_T, advantages_T, entropy_T], lambda x: clipped_policy_loss(
            x[0], x[1], x[2], clip_ratio=0.2, denominator=NUM_TOKENS, entropy_T=x[3], entropy_coefficient=0.1
        )
    values_T, rollout_values_T, returns_T = random_tokens(3)
    return [values_T, rollout_values_T, returns_T], lambda x: clipped_value_loss(
        x[0], x[1], x[2], clip_value=0.2, denominator=NUM_TOKENS
    )


def totals(
    function: Callable[[list[Tensor]], Loss], parts: list[list[Tensor]]
) -> tuple[float, list[Tensor], dict[str, float]]:
    """Loss, gradient of each part, and metrics, added up over the parts as micro-batches and ranks are."""
    loss_sum, gradients, sums = 0.0, [], dict[str, float]()
    for part in parts:
        first = part[0].clone().requires_grad_()
        loss, metrics = function([first, *part[1:]])
        gradients.append(torch.autograd.grad(loss, first)[0])
        loss_sum += float(loss.detach())
        assert not any(metric.requires_grad for metric in metrics.values())
        assert all(metric.shape == () for metric in metrics.values())
        for key, metric in metrics.items():
            sums[key] = sums.get(key, 0.0) + float(metric)
    return loss_sum, gradients, sums


LOSSES = ["next_token", "policy", "value"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [[30], [1, 2, 50], [0, 17, 17, 60]])
def test_parts_add_up_to_the_whole(name: str, cuts: list[int]) -> None:
    """Micro-batches and ranks, some of them empty, each divided by the global denominator."""
    inputs, function = whole_and_part(name)
    parts = [[tensor[a:b] for tensor in inputs] for a, b in pairwise([0, *cuts, NUM_TOKENS])]
    loss, (gradient,), metrics = totals(function, [inputs])
    part_loss, part_gradients, part_metrics = totals(function, parts)
    assert part_loss == pytest.approx(loss, rel=1e-12)
    assert part_metrics == pytest.approx(metrics, rel=1e-12)
    torch.testing.assert_close(torch.cat(part_gradients), gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_order_does_not_matter(name: str) -> None:
    inputs, function = whole_and_part(name)
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(3))
    loss, (gradient,), metrics = totals(function, [inputs])
    moved_loss, (moved_gradient,), moved_metrics = totals(function, [[tensor[order] for tensor in inputs]])
    assert moved_loss == pytest.approx(loss, rel=1e-12)
    assert moved_metrics == pytest.approx(metrics, rel=1e-12)
    torch.testing.assert_close(moved_gradient, gradient[order])


@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences(name: str) -> None:
    inputs, function = whole_and_part(name)
    first = inputs[0][:8].clone().requires_grad_()
    rest = [tensor[:8] for tensor in inputs[1:]]
    assert torch.autograd.gradcheck(lambda x: function([x, *rest])[0], (first,))


@pytest.mark.parametrize("name", LOSSES)
def test_padding_does_not_matter(name: str) -> None:
    """A padded batch whose padding is masked (or has advantage 0, or value equal to return) gives the packed loss."""
    inputs, function = whole_and_part(name)
    padded = [torch.cat([tensor, torch.zeros(25, dtype=tensor.dtype)]) for tensor in inputs]
    loss, (gradient,), _ = totals(function, [inputs])
    padded_loss, (padded_gradient,), _ = totals(function, [padded])
    assert padded_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(padded_gradient[:NUM_TOKENS], gradient)
    assert bool((padded_gradient[NUM_TOKENS:] == 0).all())


@pytest.mark.parametrize("name", ["policy", "value"])
def test_gradients_flow_into_the_model_alone(name: str) -> None:
    inputs, function = whole_and_part(name)
    for tensor in inputs:
        tensor.requires_grad_()
    loss, _ = function(inputs)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    flows = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert flows == ([True, False, False, True] if name == "policy" else [True, False, False])


@pytest.mark.parametrize("name", LOSSES)
def test_refuses_what_would_broadcast(name: str) -> None:
    inputs, function = whole_and_part(name)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        function([inputs[0], inputs[1][:, None], *inputs[2:]])
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        function([inputs[0][:1], *inputs[1:]])


@pytest.mark.parametrize("denominator", [0, -1, float("nan")])
def test_refuses_impossible_denominators(denominator: float) -> None:
    one = torch.zeros(1)
    with pytest.raises(AlgorithmError, match="a loss is divided by"):
        next_token_loss(one, one, denominator)
    with pytest.raises(AlgorithmError, match="a loss is divided by"):
        clipped_policy_loss(one, one, one, clip_ratio=0.2, denominator=denominator)
    with pytest.raises(AlgorithmError, match="a loss is divided by"):
        clipped_value_loss(one, one, one, clip_value=None, denominator=denominator)
