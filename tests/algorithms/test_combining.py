"""Several rewards made one: Llama 2's rule, linear, gated."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.combining import gated, linear, piecewise, safety_decides, whitened_piecewise
from algorithms.errors import AlgorithmError, ShapeMismatch
from tests.algorithms import slow


def test_piecewise_by_hand() -> None:
    """ln(0.15 / 0.85) = -1.7346. Tagged prompt: safety. Safety -1.73: safe enough, helpfulness. -1.74: safety."""
    helpfulness, safety = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([2.0, -1.73, -1.74])
    tagged = torch.tensor([True, False, False])
    assert safety_decides(safety, tagged).tolist() == [True, False, True]
    assert piecewise(helpfulness, safety, tagged).tolist() == pytest.approx([2.0, 4.0, -1.74])


def test_piecewise_equals_the_paper_on_probabilities() -> None:
    """Sigmoid, compare with 0.15, choose, logit, whiten: Llama 2 as it is written."""
    source = torch.Generator().manual_seed(0)
    helpfulness, safety = (3 * torch.randn(200, dtype=torch.float64, generator=source) for _ in range(2))
    tagged = torch.rand(200, generator=source) < 0.2
    chosen = []
    for h, s, is_safety in zip(helpfulness.tolist(), safety.tolist(), tagged.tolist(), strict=True):
        p_help, p_safe = 1 / (1 + math.exp(-h)), 1 / (1 + math.exp(-s))
        p = p_safe if is_safety or p_safe < 0.15 else p_help
        chosen.append(math.log(p / (1 - p)))
    got = piecewise(helpfulness, safety, tagged)
    torch.testing.assert_close(got, torch.tensor(chosen, dtype=torch.float64))
    assert 40 < int((got == safety).sum()) < 160, "both are chosen"
    white = torch.tensor(slow.whiten(chosen), dtype=torch.float64)
    torch.testing.assert_close(whitened_piecewise(helpfulness, safety, tagged), white)


def test_extreme_logits() -> None:
    """Where a sigmoid is 1.0 or 0.0 exactly and its logit infinite. A safety of NaN is not taken for safe."""
    untagged = torch.tensor([False, False, False])
    got = piecewise(torch.tensor([80.0, -500.0, 1.0]), torch.tensor([500.0, 1.0, -900.0]), untagged)
    assert got.tolist() == [80.0, -500.0, -900.0]
    assert math.isnan(float(piecewise(torch.ones(1), torch.tensor([math.nan]), untagged[:1])))
    assert float(gated(torch.ones(1), torch.tensor([math.nan]), threshold=0.0, replacement=-1.0)) == -1.0


def test_order_does_not_matter() -> None:
    source = torch.Generator().manual_seed(1)
    helpfulness, safety = (3 * torch.randn(50, dtype=torch.float64, generator=source) for _ in range(2))
    tagged, order = torch.rand(50, generator=source) < 0.2, torch.randperm(50, generator=source)
    whole = whitened_piecewise(helpfulness, safety, tagged)
    torch.testing.assert_close(whitened_piecewise(helpfulness[order], safety[order], tagged[order]), whole[order])


def test_linear_by_hand() -> None:
    scores = {"helpful": torch.tensor([1.0, 2.0]), "safe": torch.tensor([10.0, -4.0])}
    assert linear(scores, {"safe": 0.5, "helpful": 2.0}).tolist() == [7.0, 2.0]


def test_linear_does_not_depend_on_the_order_of_the_configuration() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, 1e8 - 1e8 + 1 is 1."""
    numbers = {"a": 1e8, "b": 1.0, "c": -1e8}
    sums = [
        float(linear({name: torch.tensor([numbers[name]]) for name in order}, dict.fromkeys(reversed(order), 1.0)))
        for order in ("abc", "acb", "cab", "bca")
    ]
    assert len(set(sums)) == 1


def test_gated_by_hand() -> None:
    got = gated(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0.4, 0.5, 0.6]), threshold=0.5, replacement=-2.0)
    assert got.tolist() == [-2.0, 6.0, 7.0]


def test_nothing() -> None:
    none = torch.zeros(0)
    assert piecewise(none, none, none.bool()).shape == whitened_piecewise(none, none, none.bool()).shape == (0,)
    assert linear({"a": none}, {"a": 1.0}).shape == gated(none, none, threshold=0.0, replacement=0.0).shape == (0,)


def test_refusals() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    for wrong in ((one, two, two), (two, one, two), (two, two, one), (two, two[:, None], two)):
        with pytest.raises(ShapeMismatch, match="vectors of one length"):
            piecewise(*wrong)
    for threshold in (0.0, 1.0, -0.2, math.nan):
        with pytest.raises(AlgorithmError, match="it is a probability between 0 and 1"):
            piecewise(two, two, two, threshold)
    with pytest.raises(ShapeMismatch, match=r"'a': \(2,\), 'b': \(1,\)"):
        linear({"a": two, "b": one}, {"a": 1.0, "b": 1.0})
    with pytest.raises(AlgorithmError, match=r"scores of \['a'\] with weights of \['b'\]"):
        linear({"a": two}, {"b": 1.0})
    with pytest.raises(AlgorithmError, match="give one weight a score"):
        linear({}, {})
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        gated(two, one, threshold=0.0, replacement=0.0)
