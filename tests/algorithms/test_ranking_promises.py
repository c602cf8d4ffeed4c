"""What all losses of reward models promise: parts add up, order does not matter, wrong shapes are refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.losses import Loss
from algorithms.ranking import (
    best_of_loss,
    centring_term,
    kwise_centring_term,
    kwise_loss,
    pairwise_loss,
    soft_pairwise_loss,
)
from tests.algorithms.ranking_inputs import (
    NUM_PAIRS,
    NUM_RANKED,
    SIZES,
    Ranked,
    doubles,
    floats,
    prompts_of,
    ranked,
    reverse_order,
    same_order,
)


def _kwise(batch: Ranked) -> Loss:
    return kwise_loss(batch.scores_N, batch.ranks_N, batch.offsets, margins_P=batch.margins_P, denominator=NUM_RANKED)


def _best_of(batch: Ranked) -> Loss:
    return best_of_loss(batch.scores_N, batch.ranks_N, batch.offsets, denominator=NUM_RANKED)


def _kwise_centring(batch: Ranked) -> Loss:
    return kwise_centring_term(batch.scores_N, batch.ranks_N, batch.offsets, coefficient=0.1, denominator=NUM_RANKED)


PROMPT_LOSSES = [_kwise, _best_of, _kwise_centring]
PAIR_LOSSES: dict[str, Callable[[list[Tensor]], Loss]] = {
    "pairwise": lambda x: pairwise_loss(x[0], x[1], denominator=NUM_PAIRS),
    "soft": lambda x: soft_pairwise_loss(x[0], x[1], x[2], denominator=NUM_PAIRS),
    "centring": lambda x: centring_term(x[0], x[1], coefficient=0.1, denominator=NUM_PAIRS),
}


def pair_inputs() -> list[Tensor]:
    first_N, second_N, logits_N = doubles(3)
    return [first_N, second_N, logits_N.sigmoid()]


def check_adds_up(whole: Loss, scores: Tensor, parts: list[Loss]) -> None:
    """Losses, metrics and gradients of the parts, all of the same scores, make those of the whole."""
    loss, metrics = whole
    assert not any(metric.requires_grad for metric in metrics.values())
    assert all(metric.shape == () for metric in metrics.values())
    added = torch.stack([part for part, _ in parts]).sum()
    assert float(added.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(added, scores)[0], torch.autograd.grad(loss, scores)[0])
    sums = {name: sum(float(part[name]) for _, part in parts) for name in metrics}
    assert sums == pytest.approx(floats(metrics), rel=1e-12)


@pytest.mark.parametrize("function", PROMPT_LOSSES)
@pytest.mark.parametrize("cuts", [[4], [1, 2, 7], [0, 3, 3, 9]])
def test_prompts_add_up(function: Callable[[Ranked], Loss], cuts: list[int]) -> None:
    """Micro-batches and ranks, some of them empty, each divided by the global denominator."""
    batch = ranked()
    batch.scores_N.requires_grad_()
    orders = [list(range(a, b)) for a, b in pairwise([0, *cuts, len(SIZES)])]
    parts = [function(prompts_of(batch, order, same_order)) for order in orders]
    check_adds_up(function(batch), batch.scores_N, parts)


@pytest.mark.parametrize("function", PROMPT_LOSSES)
def test_order_of_prompts_and_responses_does_not_matter(function: Callable[[Ranked], Loss]) -> None:
    batch = ranked()
    batch.scores_N.requires_grad_()
    moved = function(prompts_of(batch, [5, 2, 0, 8, 1, 7, 3, 6, 4], reverse_order))
    check_adds_up(function(batch), batch.scores_N, [moved])


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("cuts", [[30], [1, 2, 35], [0, 17, 17, 40]])
def test_pairs_add_up(name: str, cuts: list[int]) -> None:
    inputs, function = pair_inputs(), PAIR_LOSSES[name]
    inputs[0].requires_grad_()
    bounds = list(pairwise([0, *cuts, NUM_PAIRS]))
    check_adds_up(function(inputs), inputs[0], [function([x[a:b] for x in inputs]) for a, b in bounds])
    order = torch.randperm(NUM_PAIRS, generator=torch.Generator().manual_seed(3))
    check_adds_up(function(inputs), inputs[0], [function([x[order] for x in inputs])])


@pytest.mark.parametrize("function", PROMPT_LOSSES)
def test_no_prompts_give_nothing(function: Callable[[Ranked], Loss]) -> None:
    none = prompts_of(ranked(), [], same_order)
    none.scores_N.requires_grad_()
    loss, metrics = function(none)
    assert float(loss.detach()) == 0 and all(x == 0 for x in floats(metrics).values())
    assert torch.autograd.grad(loss, none.scores_N)[0].shape == (0,)


@pytest.mark.parametrize("function", PROMPT_LOSSES)
def test_a_prompt_without_responses_changes_nothing(function: Callable[[Ranked], Loss]) -> None:
    batch = ranked()
    offsets = torch.cat([batch.offsets[:3], batch.offsets[2:]])
    margins_P = torch.cat([batch.margins_P[:2], torch.ones(1), batch.margins_P[2:]])
    loss, _ = function(batch._replace(offsets=offsets, margins_P=margins_P))
    assert float(loss) == pytest.approx(float(function(batch)[0]), rel=1e-12)


@pytest.mark.parametrize("function", PROMPT_LOSSES)
def test_finite_differences_of_prompts(function: Callable[[Ranked], Loss]) -> None:
    batch = prompts_of(ranked(), [0, 1, 2, 5], same_order)
    scores_N = batch.scores_N.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(batch._replace(scores_N=x))[0], (scores_N,))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_finite_differences_of_pairs(name: str) -> None:
    first_N, second_N, preferences_N = (x[:8] for x in pair_inputs())
    function = PAIR_LOSSES[name]
    inputs = (first_N.requires_grad_(), second_N.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: function([x, y, preferences_N])[0], inputs)


def test_gradients_flow_into_scores_alone() -> None:
    batch, (first_N, second_N, preferences_N) = ranked(), pair_inputs()
    for tensor in (batch.scores_N, batch.margins_P, first_N, second_N, preferences_N):
        tensor.requires_grad_()
    loss, _ = _kwise(batch)
    assert torch.autograd.grad(loss, [batch.scores_N, batch.margins_P], allow_unused=True)[1] is None
    loss, _ = PAIR_LOSSES["soft"]([first_N, second_N, preferences_N])
    assert torch.autograd.grad(loss, [first_N, preferences_N], allow_unused=True)[1] is None


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_refuses_pairs_that_would_broadcast(name: str) -> None:
    first_N, second_N, preferences_N = pair_inputs()
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        PAIR_LOSSES[name]([first_N, second_N[:, None], preferences_N])
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        PAIR_LOSSES[name]([first_N[:1], second_N, preferences_N])
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        PAIR_LOSSES["soft"]([first_N, second_N, preferences_N[:1]])


@pytest.mark.parametrize("function", PROMPT_LOSSES)
def test_refuses_prompts_of_wrong_shape(function: Callable[[Ranked], Loss]) -> None:
    batch = ranked()
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        function(batch._replace(scores_N=batch.scores_N[:, None]))
    with pytest.raises(ShapeMismatch, match="they must rise from 0 to the"):
        function(batch._replace(offsets=batch.offsets[:-1], margins_P=batch.margins_P[1:]))
    others: dict[Callable[[Ranked], Loss], str] = {_kwise: "margins_P", _best_of: "ranks_N"}
    wrong = others.get(function)
    if wrong:
        with pytest.raises(ShapeMismatch, match="vectors of one length"):
            function(batch._replace(**{wrong: torch.zeros(1, dtype=torch.int64)}))


@pytest.mark.parametrize("denominator", [0, -1, float("nan")])
def test_refuses_impossible_denominators(denominator: float) -> None:
    one, ranks_N, offsets = torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1])
    calls: list[Callable[[], Loss]] = [
        lambda: pairwise_loss(one, one, denominator=denominator),
        lambda: soft_pairwise_loss(one, one, one, denominator=denominator),
        lambda: centring_term(one, one, coefficient=1.0, denominator=denominator),
        lambda: kwise_loss(one, ranks_N, offsets, denominator=denominator),
        lambda: best_of_loss(one, ranks_N, offsets, denominator=denominator),
        lambda: kwise_centring_term(one, ranks_N, offsets, coefficient=1.0, denominator=denominator),
    ]
    for call in calls:
        with pytest.raises(AlgorithmError, match="a loss is divided by"):
            call()
