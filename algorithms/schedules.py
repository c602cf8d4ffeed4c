"""Learning-rate schedules as pure functions of the update. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from algorithms.errors import AlgorithmError


def learning_rate(
    update: int,
    num_updates: int,
    peak: float,
    shape: Literal["constant", "linear", "cosine"],
    warmup_fraction: float,
    final_fraction: float,
) -> float:
    """Learning rate of update number ``update`` (0-based) of ``num_updates``.

    The rate rises linearly over the first ``ceil(warmup_fraction * num_updates)`` updates, the last of which is at
    the peak, and then falls to ``final_fraction * peak`` at the last update of the run (``linear``, ``cosine``) or
    stays (``constant``).

    >>> [round(learning_rate(i, 5, 1.0, "linear", 0.2, 0.0), 2) for i in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]

    Raises:
        AlgorithmError: ``update`` is not of the run, or an unknown shape.
    """
    if not 0 <= update < num_updates:
        raise AlgorithmError(f"update {update} is not one of a run of {num_updates}, counted from 0")
    # 0.07 * 100 is a little above 7, and means 7.
    num_warmup = math.ceil(warmup_fraction * num_updates - 1e-9)
    if update < num_warmup:
        return peak * (update + 1) / num_warmup
    if shape == "constant":
        return peak
    # Warm-up's last update is where the fall begins; without warm-up the first update is.
    start = max(num_warmup - 1, 0)
    done = (update - start) / max(num_updates - 1 - start, 1)
    if shape == "linear":
        left = 1 - done
    elif shape == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    else:
        raise AlgorithmError(f"no schedule has the shape {shape!r}; there are constant, linear and cosine")
    return peak * (final_fraction + (1 - final_fraction) * left)
