"""Mean and deviation of all scores that a run has seen, batch by batch (Welford 1962; Chan et al. 1979 for batches).

Imports no torch: a driver may keep them, in its checkpoint, as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from algorithms.errors import AlgorithmError


@dataclass(frozen=True)
class RunningMoments:
    """Of ``count`` numbers: their ``mean``, and ``squares``, the sum of squared distances from it.

    ``dataclasses.asdict`` gives numbers that JSON keeps exactly, and ``RunningMoments(**those)`` takes them back. How
    the numbers were cut into batches, and their order, do not matter but for the last digit.

    >>> RunningMoments().updated([1.0, 3.0]).updated([5.0, 7.0])
    RunningMoments(count=4, mean=4.0, squares=20.0)

    Raises:
        AlgorithmError: values that no numbers have.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 0 or not math.isfinite(self.mean) or not (math.isfinite(self.squares) and self.squares >= 0):
            raise AlgorithmError(f"{self}: no numbers have such moments")

    @property
    def std(self) -> float:
        """The biased deviation, as everywhere here; 1 where there is nothing to scale by: no spread so far."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0

    def updated(self, numbers: Sequence[float]) -> RunningMoments:
        """With a further batch; an empty one changes nothing.

        Raises:
            AlgorithmError: a number is not finite, with its place.
        """
        for place, number in enumerate(numbers):
            if not math.isfinite(number):
                raise AlgorithmError(f"number {place} of {len(numbers)} is {number}; moments are of finite numbers")
        if not numbers:
            return self
        mean = math.fsum(numbers) / len(numbers)
        squares = math.fsum((number - mean) ** 2 for number in numbers)
        count = self.count + len(numbers)
        distance = mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + distance * len(numbers) / count,
            squares=self.squares + squares + distance * distance * self.count * len(numbers) / count,
        )
