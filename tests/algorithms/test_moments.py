"""Running mean and deviation."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import asdict

import pytest

from algorithms.errors import AlgorithmError
from algorithms.moments import RunningMoments


def test_by_hand() -> None:
    """1, 3 | 5, 7: mean 4, squares 9 + 1 + 1 + 9."""
    moments = RunningMoments().updated([1.0, 3.0]).updated([5.0, 7.0])
    assert (moments.count, moments.mean, moments.squares) == (4, 4.0, 20.0)
    assert moments.std == math.sqrt(5)


@pytest.mark.parametrize("offset", [0.0, 1e9])
@pytest.mark.parametrize("cuts", [[100], [1] * 100, [0, 40, 0, 59, 1]])
def test_equals_the_whole_however_it_is_cut(cuts: list[int], offset: float) -> None:
    """Also far from 0, where a sum of squares less the square of a sum would be noise."""
    source = random.Random(0)
    numbers = [offset + source.gauss(3, 2) for _ in range(100)]
    moments, rest = RunningMoments(), list(numbers)
    for length in cuts:
        moments, rest = moments.updated(rest[:length]), rest[length:]
    assert not rest
    assert moments.count == 100
    assert moments.mean == pytest.approx(statistics.fmean(numbers), rel=1e-14)
    assert moments.std == pytest.approx(statistics.pstdev(numbers), rel=1e-6 if offset else 1e-12)


def test_order_does_not_matter() -> None:
    source = random.Random(1)
    numbers = [source.gauss(0, 1) for _ in range(50)]
    moved = RunningMoments().updated(numbers[30:]).updated(numbers[:30])
    there = RunningMoments().updated(numbers[:30]).updated(numbers[30:])
    assert moved.mean == pytest.approx(there.mean, rel=1e-12) and moved.std == pytest.approx(there.std, rel=1e-12)


def test_json_keeps_them_exactly() -> None:
    moments = RunningMoments().updated([0.1, 0.2, 1 / 3])
    assert RunningMoments(**json.loads(json.dumps(asdict(moments)))) == moments


@pytest.mark.parametrize("numbers", [[], [5.0], [5.0, 5.0]])
def test_nothing_to_scale_by(numbers: list[float]) -> None:
    assert RunningMoments().updated(numbers).std == 1.0


def test_updates_leave_the_old_ones() -> None:
    moments = RunningMoments().updated([1.0])
    moments.updated([3.0])
    assert moments == RunningMoments(1, 1.0, 0.0)
    assert moments.updated([]) is moments


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_refuses_numbers_that_are_not_finite(wrong: float) -> None:
    with pytest.raises(AlgorithmError, match="number 1 of 2"):
        RunningMoments().updated([0.0, wrong])


@pytest.mark.parametrize("wrong", [{"count": -1}, {"mean": math.nan}, {"squares": -1.0}, {"squares": math.inf}])
def test_refuses_moments_of_no_numbers(wrong: dict[str, float]) -> None:
    with pytest.raises(AlgorithmError, match="no numbers have such moments"):
        RunningMoments(**{"count": 3, "mean": 0.0, "squares": 1.0, **wrong})  # type: ignore[arg-type]
