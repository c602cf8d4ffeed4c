"""The reward of each token."""

from __future__ import annotations

import pytest
import torch

from algorithms.errors import ShapeMismatch
from algorithms.rewards import per_token_rewards
from tests.algorithms import slow


def test_rewards_by_hand() -> None:
    """Two samples, of 2 tokens and of 1; coefficient 0.1.

    Log ratios: -1 - -3 = 2, -1 - -0.5 = -0.5 | -2 - -2 = 0. Penalties: -0.2, 0.05 | 0. Scores 10 and -4 on the last:
    -0.2, 10.05 | -4.
    """
    got = per_token_rewards(
        torch.tensor([10.0, -4.0]),
        torch.tensor([-1.0, -1.0, -2.0]),
        torch.tensor([-3.0, -0.5, -2.0]),
        torch.tensor([0, 2, 3]),
        0.1,
    )
    torch.testing.assert_close(got, torch.tensor([-0.2, 10.05, -4.0]))


def test_rewards_equal_slow_code_and_sum_to_the_objective() -> None:
    """Summed over a sample they are r(x, y) - beta log(pi(y|x) / pi_ref(y|x)), InstructGPT's equation 2."""
    source = torch.Generator().manual_seed(1)
    lengths = [3, 1, 8, 2, 5]
    offsets = slow.offsets_of(lengths)
    scores_N = torch.randn(5, dtype=torch.float64, generator=source)
    behaviour_T, ref_T = (-torch.rand(19, dtype=torch.float64, generator=source) for _ in range(2))
    got_T = per_token_rewards(scores_N, behaviour_T, ref_T, offsets, 0.3)
    rows = zip(
        scores_N.tolist(),
        slow.samples(behaviour_T, offsets),
        slow.samples(ref_T, offsets),
        slow.samples(got_T, offsets),
        strict=True,
    )
    for score, behaviour, reference, got in rows:
        expected = slow.rewards(score, behaviour.tolist(), reference.tolist(), 0.3)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
        assert float(got.sum()) == pytest.approx(score - 0.3 * float((behaviour - reference).sum()), rel=1e-12)


def test_no_gradient_flows_through_the_penalty() -> None:
    behaviour_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    got = per_token_rewards(torch.tensor([1.0]), behaviour_T, torch.zeros(2), torch.tensor([0, 2]), 0.1)
    assert not got.requires_grad


def test_refusals() -> None:
    two = torch.zeros(2)
    with pytest.raises(ShapeMismatch, match="sample 1 of the batch has no response token"):
        per_token_rewards(two, two, two, torch.tensor([0, 2, 2]), 0.1)
    with pytest.raises(ShapeMismatch, match=r"offsets go from 0 to 1; they must rise from 0 to the 2 tokens"):
        per_token_rewards(two, two, two, torch.tensor([0, 1, 1]), 0.1)
    with pytest.raises(ShapeMismatch, match=r"'behaviour_logprobs': \(2,\), 'ref_logprobs': \(3,\)"):
        per_token_rewards(two, two, torch.zeros(3), torch.tensor([0, 1, 2]), 0.1)
    with pytest.raises(ShapeMismatch, match=r"'scores': \(3,\), 'lengths': \(2,\)"):
        per_token_rewards(torch.zeros(3), two, two, torch.tensor([0, 1, 2]), 0.1)
