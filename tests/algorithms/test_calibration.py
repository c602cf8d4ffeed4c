"""Calibration: values by hand, slow code, and that counts add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from algorithms.calibration import ReliabilityBin, calibration_counts, expected_calibration_error, reliability
from algorithms.errors import AlgorithmError, ShapeMismatch
from tests.algorithms import slow_ranking


def margins(length: int = 300, seed: int = 0) -> Tensor:
    """With ties, and of a model that is surer than it is right."""
    drawn = 2 * torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    drawn[:5] = 0
    return drawn


def test_by_hand() -> None:
    """Two bins, up to 0.75 and up to 1. Margins ln 1.5, -ln 1.5: confidence 0.6, one right. ln 4 twice, -ln 4: 0.8.

    Accuracies 1/2 and 2/3. ECE: 2/5 |0.5 - 0.6| + 3/5 |2/3 - 0.8| = 0.04 + 0.08 = 0.12.
    """
    margins_N = torch.tensor([1.5, 1 / 1.5, 4, 4, 1 / 4], dtype=torch.float64).log()
    counts = calibration_counts(margins_N, 2)
    torch.testing.assert_close(counts, torch.tensor([[2, 1.2, 1], [3, 2.4, 2]], dtype=torch.float64))
    assert expected_calibration_error(counts) == pytest.approx(0.12)
    low, high = reliability(counts)
    assert (low.low, low.high, high.low, high.high) == (0.5, 0.75, 0.75, 1.0)
    assert (low.count, low.confidence, low.accuracy) == pytest.approx((2, 0.6, 0.5))
    assert (high.count, high.confidence, high.accuracy) == pytest.approx((3, 0.8, 2 / 3))


@pytest.mark.parametrize("num_bins", [1, 5, 15])
def test_equals_slow_code(num_bins: int) -> None:
    margins_N = margins()
    weights_N = margins(seed=1).abs() + 0.1
    for weights in (None, weights_N):
        listed = [1.0] * 300 if weights is None else weights.tolist()
        wanted = slow_ranking.calibration_counts(margins_N.tolist(), num_bins, listed)
        counts = calibration_counts(margins_N, num_bins, weights)
        torch.testing.assert_close(counts, torch.tensor(wanted, dtype=torch.float64))
        error = sum(row[0] / sum(listed) * abs(row[2] / row[0] - row[1] / row[0]) for row in wanted if row[0])
        assert expected_calibration_error(counts) == pytest.approx(error, rel=1e-12)


def test_parts_add_up_in_any_order() -> None:
    margins_N = margins()
    whole = calibration_counts(margins_N, 10)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    parts = torch.split(margins_N[order], [0, 1, 120, 179])
    torch.testing.assert_close(sum(calibration_counts(part, 10) for part in parts), whole)


def test_a_calibrated_model_has_no_error() -> None:
    """Of pairs with margin d a share of sigmoid(d) is right: 3 of 4 at ln 3, 9 of 10 at ln 9, half at 0."""
    shares = {math.log(3): (30, 10), math.log(9): (90, 10), 0.0: (7, 0)}
    drawn = [sign * d for d, (right, wrong) in shares.items() for sign in [1] * right + [-1] * wrong]
    assert expected_calibration_error(calibration_counts(torch.tensor(drawn), 10)) == pytest.approx(0, abs=1e-7)


def test_an_untrained_model_is_calibrated() -> None:
    """It says 0.5 of everything, and is right by half."""
    assert expected_calibration_error(calibration_counts(torch.zeros(9), 10)) == 0.0


def test_sure_and_wrong_is_an_error_of_1() -> None:
    counts = calibration_counts(torch.tensor([-1e4, -torch.inf]), 10)
    assert expected_calibration_error(counts) == pytest.approx(1.0)
    assert counts[-1].tolist() == [2.0, 2.0, 0.0]


def test_bins_hold_their_upper_edge() -> None:
    """The lowest confidence there is goes to the first bin, certainty to the last."""
    counts = calibration_counts(torch.tensor([0.0, 1e-9, 1e4]), 4)
    assert counts[:, 0].tolist() == [2.0, 0.0, 0.0, 1.0]
    near = math.log(3) + 1e-16 * torch.arange(-20, 21, dtype=torch.float64)
    edge = near[near.sigmoid() == 0.75]
    assert len(edge), "the inputs reach what they are to test"
    assert calibration_counts(edge, 4)[:, 0].tolist() == [0.0, len(edge), 0.0, 0.0]


def test_counts_of_float32_do_not_stop_at_16_million() -> None:
    """2^24 + 1 is not a float32."""
    many = calibration_counts(torch.ones(2), 1, torch.tensor([2.0**24, 1.0]))
    assert float(many[0, 0]) == 2**24 + 1


def test_nothing_has_no_error_to_speak_of() -> None:
    counts = calibration_counts(torch.zeros(0), 2)
    assert counts.tolist() == [[0.0] * 3] * 2
    assert math.isnan(expected_calibration_error(counts))
    assert reliability(counts) == [
        ReliabilityBin(0.5, 0.75, 0.0, None, None),
        ReliabilityBin(0.75, 1.0, 0.0, None, None),
    ]


def test_no_gradient_flows_back() -> None:
    assert not calibration_counts(torch.ones(2, requires_grad=True), 2).requires_grad


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(AlgorithmError, match="1 of 2 margins are NaN"):
        calibration_counts(torch.tensor([1.0, math.nan]), 2)
    with pytest.raises(AlgorithmError, match="in 0 bins"):
        calibration_counts(torch.zeros(1), 0)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        calibration_counts(torch.zeros(2, 1), 2)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        calibration_counts(torch.zeros(2), 2, torch.ones(1))
    for function in (expected_calibration_error, reliability):
        with pytest.raises(ShapeMismatch, match=r"are \(num_bins, 3\)"):
            function(torch.zeros(3))
