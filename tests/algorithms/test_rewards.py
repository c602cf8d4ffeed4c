"""Shaping of scores, and the reward of each token."""

from __future__ import annotations

import pytest
import torch

from algorithms.errors import ShapeMismatch
from algorithms.rewards import per_token_rewards, shape_scores
from tests.algorithms import slow

SCORES = torch.tensor([7.0, -9.0, 1.0, 7.0])
FINISHED = torch.tensor([True, True, True, False])


@pytest.mark.parametrize(
    ("clip", "replacement", "penalty", "expected"),
    [
        (None, None, 0.0, [7.0, -9.0, 1.0, 7.0]),
        (5.0, None, 0.0, [5.0, -5.0, 1.0, 5.0]),
        (None, -1.0, 0.0, [7.0, -9.0, 1.0, -1.0]),
        (None, None, 2.0, [7.0, -9.0, 1.0, 5.0]),
        # The clip is of the reward model's score: neither a replacement of -8 nor a penalty is clipped.
        (5.0, -8.0, 0.0, [5.0, -5.0, 1.0, -8.0]),
        (5.0, None, 2.0, [5.0, -5.0, 1.0, 3.0]),
        (5.0, -8.0, 2.0, [5.0, -5.0, 1.0, -10.0]),
        # A replacement of 0 is a replacement.
        (None, 0.0, 0.0, [7.0, -9.0, 1.0, 0.0]),
    ],
)
def test_scores_by_hand(clip: float | None, replacement: float | None, penalty: float, expected: list[float]) -> None:
    got = shape_scores(SCORES, FINISHED, clip=clip, missing_eos_score=replacement, missing_eos_penalty=penalty)
    assert got.tolist() == expected
    assert SCORES.tolist() == [7.0, -9.0, 1.0, 7.0], "the column it was given may be shared memory"


def test_scores_equal_slow_code() -> None:
    source = torch.Generator().manual_seed(0)
    scores_N = 5 * torch.randn(50, dtype=torch.float64, generator=source)
    finished_N = torch.rand(50, generator=source) < 0.6
    for clip in (None, 3.0):
        for replacement in (None, -1.5):
            for penalty in (0.0, 0.7):
                got = shape_scores(
                    scores_N, finished_N, clip=clip, missing_eos_score=replacement, missing_eos_penalty=penalty
                )
                expected = [
                    slow.shape_score(score, finished, clip, replacement, penalty)
                    for score, finished in zip(scores_N.tolist(), finished_N.tolist(), strict=True)
                ]
                torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


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
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        shape_scores(two[:, None], FINISHED[:2], clip=None, missing_eos_score=None, missing_eos_penalty=0.0)
