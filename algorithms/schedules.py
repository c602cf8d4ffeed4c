"""Learning-rate schedules as pure functions of the update. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal


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
        ValueError: ``update`` is not of the run.
    """
    if not 0 <= update < num_updates:
        raise ValueError(f"update {update} is not one of a run of {num_updates}")
    num_warmup = math.ceil(warmup_fraction * num_updates)
    if update < num_warmup:
        return peak * (update + 1) / num_warmup
    if shape == "constant":
        return peak
    # Warm-up's last update is where the fall begins; without warm-up the first update is.
    start = max(num_warmup - 1, 0)
    done = (update - start) / max(num_updates - 1 - start, 1)
    left = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (final_fraction + (1 - final_fraction) * left)
