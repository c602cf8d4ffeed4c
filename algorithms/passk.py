"""What k attempts would give, without bias, from more attempts than k. Imports no torch.

Means over prompts are the caller's: each prompt counts once, whatever its number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from algorithms.errors import AlgorithmError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples is correct: ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, equation 1).

    The mean over all choices of k of the n samples, so it is unbiased; ``1 - (1 - c/n)^k`` is not. In whole numbers
    up to the one division.

    >>> pass_at_k(4, 1, 2)
    0.5

    Raises:
        AlgorithmError: more correct samples than samples, or k not from 1 to the number of samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise AlgorithmError(f"{num_correct} of {num_samples} samples are correct; it goes from 0 to all of them")
    _require_choice(num_samples, k)
    choices = math.comb(num_samples, k)
    return (choices - math.comb(num_samples - num_correct, k)) / choices


def expected_best(scores: Sequence[float], n: int) -> float:
    """Mean score of the best of n samples: ``sum_i C(i - 1, n - 1) / C(M, n) r_(i)``, scores r_(i) ascending.

    The mean of the maximum over all choices of n of the M samples, so it is unbiased. For scores of 0 and 1 it is
    ``pass_at_k``.

    >>> expected_best([3.0, 1.0, 2.0], 2)
    2.6666666666666665

    Raises:
        AlgorithmError: n is not from 1 to the number of scores, or a score is not finite.
    """
    _require_choice(len(scores), n)
    for place, score in enumerate(scores):
        if not math.isfinite(score):
            raise AlgorithmError(f"score {place} of {len(scores)} is {score}; the best is of finite scores")
    choices = math.comb(len(scores), n)
    return math.fsum(math.comb(rank, n - 1) / choices * score for rank, score in enumerate(sorted(scores)))


def best_of_curve(scores: Sequence[float]) -> list[float]:
    """``expected_best`` of 1, 2, ... and all of the scores: from their mean to their maximum, never falling."""
    return [expected_best(scores, n) for n in range(1, len(scores) + 1)]


def best_of_kl_bound(n: int) -> float:
    """The most that best-of-n can be away from the policy it samples from: ``ln n - (n - 1) / n`` nats of KL.

    Equal to it where no two samples have the same score (Stiennon et al. 2020; as a bound: Beirami et al. 2024).

    Raises:
        AlgorithmError: n is below 1.
    """
    if n < 1:
        raise AlgorithmError(f"the best of {n} samples; it is of 1 or more")
    return math.log(n) - (n - 1) / n


def _require_choice(num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise AlgorithmError(f"{k} of {num_samples} samples cannot be chosen; choose from 1 to all of them")
