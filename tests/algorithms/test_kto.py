"""KTO: values by hand, slow code with its gradients, extremes, and what must not matter."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.kto import kto_baseline, kto_loss
from algorithms.losses import Loss
from tests.algorithms import slow_preferences as slow

LN3 = math.log(3)
NUM_RESPONSES = 30
WEIGHTS = (1.5, 0.8)


class Judged(NamedTuple):
    policy_N: Tensor
    ref_N: Tensor
    desirable_N: Tensor


def random_responses(seed: int = 0) -> Judged:
    source = torch.Generator().manual_seed(seed)
    policy_N, ref_N = (-5 * torch.rand(NUM_RESPONSES, dtype=torch.float64, generator=source) for _ in range(2))
    return Judged(policy_N, ref_N, torch.rand(NUM_RESPONSES, generator=source) < 0.4)


def loss_of(judged: Judged, whole: Judged, baseline: float | Tensor = 0.6) -> Loss:
    """Of a part of a whole batch."""
    return kto_loss(
        *judged,
        baseline,
        beta=slow.BETA,
        desirable_weight=WEIGHTS[0],
        undesirable_weight=WEIGHTS[1],
        num_desirable=int(whole.desirable_N.sum()),
        denominator=len(whole.policy_N),
    )


def floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(metric) for name, metric in metrics.items()}


def test_by_hand() -> None:
    """beta 1, z = 1, weights 2 and 3. Log ratios 1 + ln 3 and 1 - ln 3 desirable, 1 + ln 3 not, 1 not.

    1 - sigmoid: 1/4, 3/4; of the undesirable 3/4, 1/2. Loss (2 * 1/4 + 2 * 3/4 + 3 * 3/4 + 3 * 1/2) / 4 = 5.75 / 4.
    Slopes -+ weight * sigmoid (1 - sigmoid) / 4: -2 * 3/16, -2 * 3/16, 3 * 3/16, 3/4, over 4.
    Right, wrong, wrong, and on the baseline: 1.5 of 4.
    """
    log_ratios = torch.tensor([1 + LN3, 1 - LN3, 1 + LN3, 1.0], dtype=torch.float64)
    ref_N = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    policy_N = (ref_N + log_ratios).requires_grad_()
    desirable_N = torch.tensor([True, True, False, False])
    loss, metrics = kto_loss(
        policy_N,
        ref_N,
        desirable_N,
        1.0,
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=3.0,
        num_desirable=2,
        denominator=4,
    )
    assert float(loss.detach()) == pytest.approx(5.75 / 4)
    (slope,) = torch.autograd.grad(loss, policy_N)
    assert slope.tolist() == pytest.approx([-3 / 32, -3 / 32, 9 / 64, 3 / 16])
    wanted = {
        "reward_accuracy": 0.375,
        "ref_kl": -(4 + LN3) / 4,
        "kl_baseline": 1.0,
        "chosen_reward": 1.0,
        "chosen_logprob": -0.5,
        "rejected_reward": 1 + LN3 / 2,
        "rejected_logprob": (-5 + LN3) / 2,
    }
    assert floats(metrics) == pytest.approx(wanted)


def test_step_0() -> None:
    """Policy and reference equal: each costs half its weight, rewards are 0."""
    judged = random_responses()
    loss, metrics = loss_of(judged._replace(ref_N=judged.policy_N), judged, baseline=0.0)
    num_desirable = int(judged.desirable_N.sum())
    wanted = (num_desirable * WEIGHTS[0] + (NUM_RESPONSES - num_desirable) * WEIGHTS[1]) / 2 / NUM_RESPONSES
    assert float(loss) == pytest.approx(wanted)
    assert float(metrics["chosen_reward"]) == float(metrics["rejected_reward"]) == 0.0
    assert float(metrics["reward_accuracy"]) == 0.5


@pytest.mark.parametrize("baseline", [0.6, -0.6])
@pytest.mark.parametrize("seed", range(2))
def test_equals_slow_code(seed: int, baseline: float) -> None:
    """A negative baseline counts 0."""
    judged = random_responses(seed)
    policy_N = judged.policy_N.requires_grad_()
    loss, metrics = loss_of(judged, judged, baseline)
    rows = list(zip(policy_N, judged.ref_N.tolist(), judged.desirable_N.tolist(), strict=True))
    wanted = torch.stack([slow.kto(*row, baseline, WEIGHTS) for row in rows]).sum() / NUM_RESPONSES
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, policy_N)[0], torch.autograd.grad(wanted, policy_N)[0])
    zero_point = max(baseline, 0.0)
    assert float(metrics["kl_baseline"]) == pytest.approx(zero_point)
    right = sum((float(policy.detach()) - ref > zero_point) == good for policy, ref, good in rows)
    assert float(metrics["reward_accuracy"]) == pytest.approx(right / NUM_RESPONSES)
    for name, kind in (("chosen", True), ("rejected", False)):
        of_kind = [(float(policy.detach()), ref) for policy, ref, good in rows if good == kind]
        reward = sum(slow.BETA * (policy - ref) for policy, ref in of_kind) / len(of_kind)
        assert float(metrics[f"{name}_reward"]) == pytest.approx(reward)
        assert float(metrics[f"{name}_logprob"]) == pytest.approx(sum(x for x, _ in of_kind) / len(of_kind))


def test_baseline_by_hand() -> None:
    """Log ratios 1, -4, 2 make -1/3, of two parts too; it is cut off at 0 by the loss alone, once it is whole."""
    policy_N, ref_N = torch.tensor([-1.0, -6.0, -3.0], requires_grad=True), torch.tensor([-2.0, -2.0, -5.0])
    whole = kto_baseline(policy_N, ref_N, denominator=3)
    parts = [kto_baseline(policy_N[part], ref_N[part], denominator=3) for part in (slice(2), slice(2, 3), slice(0))]
    assert float(whole) == pytest.approx(-1 / 3)
    assert sum(float(part) for part in parts) == pytest.approx(-1 / 3)
    assert not whole.requires_grad


@pytest.mark.parametrize("cuts", [[20], [1, 2, 25], [0, 17, 17, 30]])
def test_parts_add_up_to_the_whole_in_any_order(cuts: list[int]) -> None:
    """Micro-batches and ranks, some of them empty, or of one kind alone."""
    judged = random_responses()
    judged.policy_N.requires_grad_()
    loss, metrics = loss_of(judged, judged)
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())
    order = torch.randperm(NUM_RESPONSES, generator=torch.Generator().manual_seed(3))
    moved = [x[order] for x in judged]
    parts = [loss_of(Judged(*(x[a:b] for x in moved)), judged) for a, b in pairwise([0, *cuts, NUM_RESPONSES])]
    added = torch.stack([part for part, _ in parts]).sum()
    torch.testing.assert_close(added, loss)
    torch.testing.assert_close(
        torch.autograd.grad(added, judged.policy_N)[0], torch.autograd.grad(loss, judged.policy_N)[0]
    )
    assert {key: sum(float(part[key]) for _, part in parts) for key in metrics} == pytest.approx(floats(metrics))


def test_nothing_gives_nothing() -> None:
    judged = random_responses()
    none = Judged(*(x[:0] for x in judged))
    none.policy_N.requires_grad_()
    loss, metrics = loss_of(none, judged)
    assert float(loss.detach()) == 0 and all(x == 0 for x in floats(metrics).values())
    assert torch.autograd.grad(loss, none.policy_N)[0].shape == (0,)


@pytest.mark.parametrize("kind", [True, False])
def test_a_mean_over_none_is_not_reported(kind: bool) -> None:
    judged = random_responses()._replace(desirable_N=torch.full((NUM_RESPONSES,), kind))
    names = {name for name in loss_of(judged, judged)[1] if name.startswith(("chosen", "rejected"))}
    prefix = "chosen" if kind else "rejected"
    assert names == {f"{prefix}_reward", f"{prefix}_logprob"}


def test_extremes_stay_finite_in_float32() -> None:
    """Far out on the wrong side a response costs its weight, on the right side nothing; neither has a gradient."""
    policy_N = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    judged = Judged(policy_N, torch.zeros(4), torch.tensor([True, True, False, False]))
    loss, metrics = loss_of(judged, judged)
    assert float(loss.detach()) == pytest.approx(sum(WEIGHTS) / 4)
    assert torch.autograd.grad(loss, policy_N)[0].tolist() == [0.0] * 4
    assert all(math.isfinite(x) for x in floats(metrics).values())


def test_small_losses_are_not_rounded_away_in_float32() -> None:
    """1 - sigmoid(20) is 2.06e-9; in float32 sigmoid(20) is 1."""
    loss, _ = kto_loss(
        torch.tensor([20.0]), torch.zeros(1), torch.tensor([True]), 0.0, beta=1.0, num_desirable=1, denominator=1
    )
    assert float(loss) == pytest.approx(2.0611536e-9)


def test_finite_differences() -> None:
    judged = random_responses()
    policy_N = judged.policy_N.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(judged._replace(policy_N=x), judged)[0], (policy_N,))


def test_gradients_flow_into_the_policy_alone() -> None:
    judged, baseline = random_responses(), torch.tensor(0.6, requires_grad=True)
    judged.policy_N.requires_grad_(), judged.ref_N.requires_grad_()
    loss, _ = loss_of(judged, judged, baseline)
    flows = torch.autograd.grad(loss, [judged.policy_N, judged.ref_N, baseline], allow_unused=True)
    assert [slope is not None for slope in flows] == [True, False, False]


@pytest.mark.parametrize("index", range(3))
def test_refuses_what_would_broadcast(index: int) -> None:
    judged = random_responses()
    for wrong in (judged[index][:, None], judged[index][:1]):
        parts = [*judged]
        parts[index] = wrong
        with pytest.raises(ShapeMismatch, match="vectors of one length"):
            loss_of(Judged(*parts), judged)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        kto_baseline(judged.policy_N, judged.ref_N[:1], denominator=1)
    with pytest.raises(AlgorithmError, match="one number of the batch"):
        loss_of(judged, judged, torch.zeros(NUM_RESPONSES))


def test_refuses_impossible_numbers() -> None:
    one, good = torch.zeros(1), torch.tensor([True])
    for denominator in (0, -1, math.nan):
        with pytest.raises(AlgorithmError, match="a loss is divided by"):
            kto_loss(one, one, good, 0.0, beta=1.0, num_desirable=0, denominator=denominator)
        with pytest.raises(AlgorithmError, match="a loss is divided by"):
            kto_baseline(one, one, denominator=denominator)
    for num_desirable in (-1, 2):
        with pytest.raises(AlgorithmError, match=f"{num_desirable} of 1 responses"):
            kto_loss(one, one, good, 0.0, beta=1.0, num_desirable=num_desirable, denominator=1)
    with pytest.raises(AlgorithmError, match="it must be above 0"):
        kto_loss(one, one, good, 0.0, beta=0.0, num_desirable=1, denominator=1)
