"""Transforms and terms of scores: values by hand, slow code, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.moments import RunningMoments
from algorithms.shaping import (
    clip_scores,
    length_penalty,
    missing_eos_penalty,
    normalise_scores,
    overlong_penalty,
    repetition_penalty,
    replace_unfinished,
)
from tests.algorithms import slow

SCORES = torch.tensor([7.0, -9.0, 1.0, 7.0])
FINISHED = torch.tensor([True, True, True, False])


def test_transforms_by_hand() -> None:
    assert clip_scores(SCORES, -5.0, 2.0).tolist() == [2.0, -5.0, 1.0, 2.0]
    assert normalise_scores(SCORES, 1.0, 2.0).tolist() == [3.0, -5.0, 0.0, 3.0]
    assert replace_unfinished(SCORES, FINISHED, -1.0).tolist() == [7.0, -9.0, 1.0, -1.0]
    assert replace_unfinished(SCORES, FINISHED, 0.0).tolist() == [7.0, -9.0, 1.0, 0.0], "0 is a replacement"
    assert SCORES.tolist() == [7.0, -9.0, 1.0, 7.0], "the column it was given may be shared memory"


def test_terms_by_hand() -> None:
    assert missing_eos_penalty(FINISHED, 2.0).tolist() == [0.0, 0.0, 0.0, -2.0]
    assert missing_eos_penalty(FINISHED.to(torch.uint8), 2.0).tolist() == [0.0, 0.0, 0.0, -2.0]
    lengths_N = torch.tensor([0, 3, 4, 10])
    assert length_penalty(lengths_N, 0.5).tolist() == [0.0, -1.5, -2.0, -5.0]
    assert length_penalty(lengths_N, 0.5, free_tokens=4).tolist() == [0.0, 0.0, 0.0, -3.0]


def test_terms_have_no_minus_zero() -> None:
    terms = [
        missing_eos_penalty(torch.tensor([True]), 2.0),
        length_penalty(torch.tensor([3]), 0.5, free_tokens=4),
        overlong_penalty(torch.tensor([3]), max_tokens=10, margin_tokens=4),
        repetition_penalty([[1, 2]], ngram=1, penalty=1.0),
    ]
    assert [str(term.item()) for term in terms] == ["0.0"] * 4


def test_together_in_their_usual_order() -> None:
    """Neither a replacement nor a penalty is clipped."""
    source = torch.Generator().manual_seed(0)
    scores_N = 5 * torch.randn(50, dtype=torch.float64, generator=source)
    finished_N = torch.rand(50, generator=source) < 0.6
    replaced_N = replace_unfinished(clip_scores(scores_N, -5.0, 5.0), finished_N, -8.0)
    expected = [
        slow.shape_score(score, finished, 5.0, -8.0, 2.0)
        for score, finished in zip(scores_N.tolist(), finished_N.tolist(), strict=True)
    ]
    assert (replaced_N + missing_eos_penalty(finished_N, 2.0)).tolist() == expected


def test_overlong_equals_slow_code() -> None:
    """The paper's figures: 16,384 tokens free, then a slope over 4,096."""
    lengths = [0, 1, 16383, 16384, 16385, 17408, 18432, 20479, 20480, 20481, 10**9]
    expected = []
    for length in lengths:
        if length <= 20480 - 4096:
            expected.append(0.0)
        elif length <= 20480:
            expected.append(((20480 - 4096) - length) / 4096)
        else:
            expected.append(-1.0)
    got = overlong_penalty(torch.tensor(lengths), max_tokens=20480, margin_tokens=4096)
    assert got.tolist() == expected
    assert expected[5:7] == [-0.25, -0.5]
    assert overlong_penalty(torch.tensor([0, 5, 10]), max_tokens=10, margin_tokens=10).tolist() == [0.0, -0.5, -1.0]


def slow_repetition(tokens: list[int], ngram: int) -> float:
    seen: list[list[int]] = []
    repeated = total = 0
    for start in range(len(tokens)):
        gram = tokens[start : start + ngram]
        if len(gram) == ngram:
            total += 1
            repeated += gram in seen
            seen.append(gram)
    return repeated / total if total else 0.0


@pytest.mark.parametrize("ngram", [1, 2, 3, 20])
def test_repetition_equals_slow_code(ngram: int) -> None:
    source = torch.Generator().manual_seed(0)
    responses = [torch.randint(0, 4, (length,), generator=source).tolist() for length in (0, 1, 2, 19, 20, 80)]
    responses.append([3] * 50)
    got = repetition_penalty(responses, ngram=ngram, penalty=0.7)
    assert got.tolist() == pytest.approx([-0.7 * slow_repetition(tokens, ngram) for tokens in responses], abs=1e-6)
    assert (got < 0).any()


def test_running_moments_normalise() -> None:
    """Scores that are scaled by their own moments have mean 0 and deviation 1; a constant becomes 0."""
    moments = RunningMoments().updated(SCORES.tolist())
    normal = normalise_scores(SCORES, moments.mean, moments.std)
    assert float(normal.mean()) == pytest.approx(0, abs=1e-6)
    assert float(normal.std(correction=0)) == pytest.approx(1)
    same = RunningMoments().updated([3.0, 3.0])
    assert normalise_scores(torch.full((2,), 3.0), same.mean, same.std).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: clip_scores(x, -1.0, 1.0),
        lambda x: normalise_scores(x, 0.0, 1.0),
        lambda x: replace_unfinished(x, x > 0, 1.0),
        lambda x: missing_eos_penalty(x > 0, 1.0),
        lambda x: length_penalty(x.long(), 1.0),
        lambda x: overlong_penalty(x.long(), max_tokens=4, margin_tokens=2),
        lambda x: repetition_penalty([], ngram=2, penalty=1.0),
    ],
)
def test_nothing(function: Callable[[Tensor], Tensor]) -> None:
    assert function(torch.zeros(0)).shape == (0,)


def test_refusals() -> None:
    with pytest.raises(AlgorithmError, match="the bounds must rise"):
        clip_scores(SCORES, 1.0, 1.0)
    for std in (0.0, -1.0, math.nan):
        with pytest.raises(AlgorithmError, match="a deviation of"):
            normalise_scores(SCORES, 0.0, std)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        replace_unfinished(SCORES, FINISHED[:, None], 0.0)
    with pytest.raises(AlgorithmError, match=r"penalty is -1\.0; it must be 0 or more"):
        missing_eos_penalty(FINISHED, -1.0)
    with pytest.raises(AlgorithmError, match="penalty_per_token is -1"):
        length_penalty(torch.tensor([1]), -1.0)
    with pytest.raises(AlgorithmError, match="free_tokens is -1"):
        length_penalty(torch.tensor([1]), 1.0, free_tokens=-1)
    for margin in (0, 11):
        with pytest.raises(AlgorithmError, match=f"a margin of {margin} of 10 tokens"):
            overlong_penalty(torch.tensor([1]), max_tokens=10, margin_tokens=margin)
    with pytest.raises(AlgorithmError, match="0-grams"):
        repetition_penalty([[1]], ngram=0, penalty=1.0)
    with pytest.raises(AlgorithmError, match="penalty is nan"):
        repetition_penalty([[1]], ngram=2, penalty=math.nan)
