"""Whether a reward model is as sure as it is right (Guo et al. 2017, section 2).

Under Bradley-Terry a margin d says that the response with the higher score is the better one with probability
``sigmoid(|d|)``: the *confidence*, from 0.5 to 1. It is *correct* where d > 0, d being the score of the response that
people preferred less that of the other.

Counts are sums: those of micro-batches, ranks and files add up, and the error of the sum is the error of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.ranking import wins
from algorithms.shapes import require_same_length


def calibration_counts(margins_N: Tensor, num_bins: int, weights_N: Tensor | None = None) -> Tensor:
    """Of each bin of confidence: how many pairs, the sum of their confidences, how many correct.

    (num_bins, 3) float64. Bins are equally wide, from 0.5 to 1, and hold their upper edge, as in the paper; the first
    holds 0.5 as well. Two equal scores have confidence 0.5 and are half correct, as in the accuracy of the losses.

    >>> calibration_counts(torch.tensor([0.0, 3.0, -3.0]), 2)
    tensor([[1.0000, 0.5000, 0.5000],
            [2.0000, 1.9051, 1.0000]], dtype=torch.float64)

    Args:
        margins_N: score of the preferred response less that of the other, one a pair. No gradient flows back.
        weights_N: of each pair; none is 1. ``RankedPairs.weights_M`` make prompts weigh the same.

    Raises:
        AlgorithmError: no bin, or a margin that is NaN.
        ShapeMismatch: lengths differ.
    """
    require_same_length(margins=margins_N, weights=margins_N if weights_N is None else weights_N)
    if num_bins < 1:
        raise AlgorithmError(f"calibration in {num_bins} bins; there must be one at least")
    margins = margins_N.detach().double()
    if bool(margins.isnan().any()):
        raise AlgorithmError(f"{int(margins.isnan().sum())} of {len(margins)} margins are NaN")
    weights = torch.ones_like(margins) if weights_N is None else weights_N.detach().double()
    confidence = margins.abs().sigmoid()
    bins = ((2 * confidence - 1) * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    sums = torch.stack([weights, weights * confidence, weights * wins(margins)], dim=1)
    return sums.new_zeros(num_bins, 3).index_add(0, bins, sums)


def expected_calibration_error(counts: Tensor) -> float:
    """``sum_b n_b / n |accuracy_b - confidence_b|`` (Guo et al. 2017, equation 3), from 0 to 1; NaN of no pairs.

    Args:
        counts: (num_bins, 3), of ``calibration_counts``, added up as needed.

    Raises:
        ShapeMismatch: they are of another shape.
    """
    _require_counts(counts)
    total = float(counts[:, 0].sum())
    return float((counts[:, 2] - counts[:, 1]).abs().sum()) / total if total else math.nan


@dataclass(frozen=True)
class ReliabilityBin:
    """One bar of a reliability diagram: pairs whose confidence is above ``low``, up to ``high``.

    ``count`` is a sum of weights. A bin without pairs has neither confidence nor accuracy.
    """

    low: float
    high: float
    count: float
    confidence: float | None
    accuracy: float | None


def reliability(counts: Tensor) -> list[ReliabilityBin]:
    """The reliability diagram as a table, from the lowest confidence to the highest (Guo et al. 2017, figure 1).

    Args:
        counts: (num_bins, 3), of ``calibration_counts``, added up as needed.

    Raises:
        ShapeMismatch: they are of another shape.
    """
    _require_counts(counts)
    width = 0.5 / len(counts)
    return [
        ReliabilityBin(
            low=0.5 + index * width,
            high=0.5 + (index + 1) * width,
            count=count,
            confidence=confidence / count if count else None,
            accuracy=correct / count if count else None,
        )
        for index, (count, confidence, correct) in enumerate(counts.tolist())
    ]


def _require_counts(counts: Tensor) -> None:
    if counts.dim() != 2 or counts.shape[1] != 3:
        raise ShapeMismatch(f"calibration counts are (num_bins, 3), got shape {tuple(counts.shape)}")
