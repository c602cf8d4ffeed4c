"""pass@k and the best of n: against all choices, one by one."""

from __future__ import annotations

import math
import random
from itertools import combinations, pairwise

import pytest

from algorithms.errors import AlgorithmError
from algorithms.passk import best_of_curve, best_of_kl_bound, expected_best, pass_at_k


def test_pass_by_hand() -> None:
    """2 of 5 are correct: of the 10 pairs 3 have none of them."""
    assert pass_at_k(5, 2, 1) == 0.4
    assert pass_at_k(5, 2, 2) == 0.7
    assert pass_at_k(5, 2, 4) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_equals_all_choices(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        correct = [place < num_correct for place in range(num_samples)]
        for k in range(1, num_samples + 1):
            passes = [any(choice) for choice in combinations(correct, k)]
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(passes) / len(passes), rel=1e-15)


def test_pass_is_unbiased() -> None:
    """Over all outcomes of 6 samples, each correct with chance 0.3, its mean is 1 - 0.7^k."""
    for k in (1, 3, 6):
        mean = sum(math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) * pass_at_k(6, c, k) for c in range(7))
        assert mean == pytest.approx(1 - 0.7**k)


def test_pass_of_very_many() -> None:
    """Binomials far beyond what a float holds."""
    assert pass_at_k(10_000, 1, 5_000) == 0.5
    assert pass_at_k(10_000, 5_000, 5_000) == 1.0
    assert 0 < pass_at_k(10**6, 1, 1) < 2e-6


def test_best_by_hand() -> None:
    """Of 1, 2, 3 the pairs' best are 2, 3, 3."""
    assert best_of_curve([3.0, 1.0, 2.0]) == pytest.approx([2.0, 8 / 3, 3.0])


@pytest.mark.parametrize("seed", range(5))
def test_best_equals_all_choices(seed: int) -> None:
    source = random.Random(seed)
    scores = [source.choice([source.gauss(0, 3), 1.0]) for _ in range(8)]
    curve = best_of_curve(scores)
    for n in range(1, 9):
        best = [max(choice) for choice in combinations(scores, n)]
        assert expected_best(scores, n) == curve[n - 1] == pytest.approx(sum(best) / len(best))
        assert expected_best(scores[::-1], n) == curve[n - 1], "the order does not matter"
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(curve))
    assert curve[0] == pytest.approx(sum(scores) / 8) and curve[-1] == max(scores)


def test_best_of_right_and_wrong_is_pass() -> None:
    scores = [1.0] * 3 + [0.0] * 5
    assert best_of_curve(scores) == pytest.approx([pass_at_k(8, 3, k) for k in range(1, 9)])


def test_best_of_very_many() -> None:
    assert expected_best([2.5] * 2000, 1000) == pytest.approx(2.5)
    assert best_of_curve([]) == []


def test_kl_of_best_of() -> None:
    """Exactly, for a uniform policy over many answers of distinct scores: n u^(n-1) against 1, u in [0, 1]."""
    assert best_of_kl_bound(1) == 0.0
    for n in (2, 8):
        grid = [(i + 0.5) / 100_000 for i in range(100_000)]
        kl = sum(n * u ** (n - 1) * math.log(n * u ** (n - 1)) for u in grid) / len(grid)
        assert best_of_kl_bound(n) == pytest.approx(kl, abs=1e-4)


def test_refusals() -> None:
    for k in (0, 6):
        with pytest.raises(AlgorithmError, match=f"{k} of 5 samples cannot be chosen"):
            pass_at_k(5, 2, k)
        with pytest.raises(AlgorithmError, match=f"{k} of 5 samples cannot be chosen"):
            expected_best([0.0] * 5, k)
    for num_correct in (-1, 6):
        with pytest.raises(AlgorithmError, match="it goes from 0 to all of them"):
            pass_at_k(5, num_correct, 1)
    with pytest.raises(AlgorithmError, match="score 1 of 2 is nan"):
        expected_best([0.0, math.nan], 1)
    with pytest.raises(AlgorithmError, match="it is of 1 or more"):
        best_of_kl_bound(0)
