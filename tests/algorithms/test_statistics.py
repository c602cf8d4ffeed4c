"""Explained variance."""

from __future__ import annotations

import pytest
import torch

from algorithms.errors import ShapeMismatch
from algorithms.statistics import explained_variance


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Returns 1, 2, 3, 6 have mean 3 and variance (4 + 1 + 0 + 9) / 4 = 3.5.
        ([1.0, 2.0, 3.0, 6.0], 1.0),
        # A critic that is off by a constant foresees all that varies.
        ([11.0, 12.0, 13.0, 16.0], 1.0),
        ([5.0, 5.0, 5.0, 5.0], 0.0),
        # What is left is 0, 1, 2, 3: variance 1.25; 1 - 1.25 / 3.5.
        ([1.0, 1.0, 1.0, 3.0], 1 - 1.25 / 3.5),
        # Minus the returns leave twice the returns: 1 - 4.
        ([-1.0, -2.0, -3.0, -6.0], -3.0),
    ],
)
def test_by_hand(values: list[float], expected: float) -> None:
    got = explained_variance(torch.tensor(values), torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert float(got) == pytest.approx(expected, abs=1e-6)


def test_of_constant_returns() -> None:
    assert float(explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 3.0]))) == 0.0


def test_refuses_other_lengths() -> None:
    with pytest.raises(ShapeMismatch):
        explained_variance(torch.zeros(3), torch.zeros(2))
