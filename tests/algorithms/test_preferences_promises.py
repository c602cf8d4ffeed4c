"""What all losses over pairs promise: parts add up, order does not matter, what makes no sense is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.preferences import (
    conservative_dpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    reference_free_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
    slic_loss,
)
from tests.algorithms.preference_inputs import (
    BETA,
    LOSSES,
    NUM_PAIRS,
    OF_LENGTHS,
    floats,
    following,
    random_pairs,
    slopes,
)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [[30], [1, 2, 35], [0, 17, 17, 40]])
def test_parts_add_up_to_the_whole_in_any_order(name: str, cuts: list[int]) -> None:
    """Micro-batches and ranks, some of them empty, each divided by the global denominator."""
    inputs = following(random_pairs())
    loss, metrics = LOSSES[name](inputs, NUM_PAIRS)
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())
    order = torch.randperm(NUM_PAIRS, generator=torch.Generator().manual_seed(3))
    parts = [LOSSES[name]([x[order][a:b] for x in inputs], NUM_PAIRS) for a, b in pairwise([0, *cuts, NUM_PAIRS])]
    added = torch.stack([part for part, _ in parts]).sum()
    torch.testing.assert_close(added, loss)
    torch.testing.assert_close(slopes(added, inputs), slopes(loss, inputs))
    sums = {key: sum(float(part[key]) for _, part in parts) for key in metrics}
    assert sums == pytest.approx(floats(metrics), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_gives_nothing(name: str) -> None:
    inputs = following([x[:0] for x in random_pairs()])
    loss, metrics = LOSSES[name](inputs, NUM_PAIRS)
    assert float(loss.detach()) == 0 and all(x == 0 for x in floats(metrics).values())
    assert torch.autograd.grad(loss, inputs[0])[0].shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences(name: str) -> None:
    policy_w, policy_v, *rest = (x[:8] for x in random_pairs())
    pair = (policy_w.requires_grad_(), policy_v.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, v: LOSSES[name]([w, v, *rest], 3)[0], pair)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_flow_into_the_policy_alone(name: str) -> None:
    inputs = following(random_pairs())
    for ref in inputs[2:4]:
        ref.requires_grad_()
    loss, _ = LOSSES[name](inputs, NUM_PAIRS)
    flows = [slope is not None for slope in torch.autograd.grad(loss, inputs[:4], allow_unused=True)]
    assert flows == [True, name != "nll", False, False]


@pytest.mark.parametrize("name", LOSSES)
def test_refuses_what_would_broadcast(name: str) -> None:
    used = {"nll": [0, 4], "simpo": [0, 1, 4, 5], "orpo": [0, 1, 4, 5], "slic": [0, 1], "reference_free": [0, 1]}
    wrongs: list[Callable[[Tensor], Tensor]] = [lambda x: x[:, None], lambda x: x[:1]]
    for index in used.get(name, [0, 1, 2, 3]):
        for wrong in wrongs:
            inputs = random_pairs()
            inputs[index] = wrong(inputs[index])
            with pytest.raises(ShapeMismatch, match="vectors of one length"):
                LOSSES[name](inputs, NUM_PAIRS)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("denominator", [0, -1, float("nan")])
def test_refuses_impossible_denominators(name: str, denominator: float) -> None:
    with pytest.raises(AlgorithmError, match="a loss is divided by"):
        LOSSES[name](random_pairs(), denominator)


@pytest.mark.parametrize("name", OF_LENGTHS)
def test_refuses_a_mean_of_no_tokens(name: str) -> None:
    inputs = random_pairs()
    inputs[4][3] = 0
    with pytest.raises(ShapeMismatch, match="response 3 of the batch has no token"):
        LOSSES[name](inputs, NUM_PAIRS)


@pytest.mark.parametrize("wrong", [0.0, -0.1, math.nan])
def test_refuses_impossible_betas(wrong: float) -> None:
    inputs = random_pairs()
    for function in (dpo_loss, ipo_loss, hinge_loss):
        with pytest.raises(AlgorithmError, match="it must be above 0"):
            function(*inputs[:4], beta=wrong, denominator=1)
    with pytest.raises(AlgorithmError, match="it must be above 0"):
        reference_free_dpo_loss(*inputs[:2], beta=wrong, denominator=1)
    with pytest.raises(AlgorithmError, match="it must be above 0"):
        simpo_loss(*inputs[:2], *inputs[4:], beta=wrong, gamma=1.0, denominator=1)


@pytest.mark.parametrize("wrong", [0.5, -0.1, math.nan])
def test_refuses_impossible_smoothing(wrong: float) -> None:
    for function in (conservative_dpo_loss, robust_dpo_loss):
        with pytest.raises(AlgorithmError, match="label_smoothing"):
            function(*random_pairs()[:4], beta=BETA, label_smoothing=wrong, denominator=1)


def test_refuses_a_negative_margin() -> None:
    with pytest.raises(AlgorithmError, match="0 or more nats"):
        slic_loss(torch.zeros(1), torch.zeros(1), margin=-1.0, denominator=1)
