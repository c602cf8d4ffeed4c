"""The exponential moving average (EMA) of weights: ``average <- decay * average + (1 - decay) * weights``.

Invariants:

- The average is kept in float32 at least. In bfloat16 it would freeze: a step of 0.008 of a small difference rounds
  away, and the average stays where it began.
- The update is elementwise, so shards of parameters, in any cut, are averaged as the whole would be.
- Averages that equal the weights stay exactly as they are.

Importing this imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from algorithms.errors import AlgorithmError, ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor


def update_averages_(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Move each average, in place, by ``1 - decay`` of the way to its weights (InstructGPT: 0.992).

    Once per optimizer step: not per micro-batch, and not where the step was skipped.

    Args:
        averages: float32 or float64, without gradients.
        weights: of the same shapes, of any floating type.
        decay: from 0 (the average is the weights) to below 1.

    Raises:
        AlgorithmError: the decay is out of range, or an average is of a type that would freeze.
        ShapeMismatch: averages and weights differ in number or in shape. Nothing has been updated then.
    """
    _require_decay(decay)
    if [average.shape for average in averages] != [weight.shape for weight in weights]:
        raise ShapeMismatch(
            f"averages are of shapes {[tuple(average.shape) for average in averages]}, weights of "
            f"{[tuple(weight.shape) for weight in weights]}; they must be the same"
        )
    for average in averages:
        if average.element_size() < 4:
            raise AlgorithmError(f"an average is kept in {average.dtype}, which freezes; keep it in float32")
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight.detach().to(average), 1 - decay)


def effective_weight(decay: float, num_updates: int) -> float:
    """What share of the average the last ``num_updates`` updates make up: ``1 - decay^n``.

    Weights that jumped to a constant n updates ago have come this far in the average. The rest is of before, or of
    the weights that the average began with.

    >>> round(effective_weight(0.992, 10), 4), round(effective_weight(0.992, 100), 3)
    (0.0772, 0.552)

    Raises:
        AlgorithmError: the decay is out of range, or the number negative.
    """
    _require_decay(decay)
    if num_updates < 0:
        raise AlgorithmError(f"{num_updates} updates; it must be 0 or more")
    if decay == 0:
        return float(num_updates > 0)
    return -math.expm1(num_updates * math.log(decay))


def _require_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise AlgorithmError(f"the decay of a moving average is {decay}; it goes from 0 to below 1")
