"""The order of rows: a pure function of (seed, epoch), the same on every machine and with every version of numpy.

Invariants:

- An epoch is as long as the sources have rows, whatever their weights, so ``num_epochs`` means what it says.
- Without weights, an epoch holds every row of every source exactly once.
- With weights, it holds each source's share (largest remainders; at least one row, however small the weight). A
  source goes through all its rows, in an order of its own, before any comes a second time; where an epoch leaves off
  in it, the next goes on.
- A ``Cursor`` names one place in this endless order. The order does not depend on how it is cut into batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from data.errors import DataError

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Cursor:
    """The next row to draw: ``position`` rows into ``epoch``. ``drawn`` counts the rows drawn in the run so far."""

    epoch: int = 0
    position: int = 0
    drawn: int = 0

    def to_json(self) -> str:
        """As a checkpoint keeps it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """Back from ``to_json``.

        Raises:
            DataError: not a cursor.
        """
        try:
            cursor = cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise DataError(f"not a data cursor: {text!r}") from error
        values = (cursor.epoch, cursor.position, cursor.drawn)
        if not all(isinstance(value, int) and value >= 0 for value in values):
            raise DataError(f"not a data cursor: {text!r}")
        return cursor


def permutation(num_rows: int, *key: int) -> Int64s:
    """A permutation of ``range(num_rows)`` that depends on ``key`` alone.

    Rows are sorted by a hash of key and row (splitmix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014), not drawn from a generator whose stream may change between versions.
    """
    state = 0
    for part in key:
        state = _splitmix((state ^ part) & _MASK)
    hashes = _splitmix_all(np.uint64(state) + np.arange(num_rows, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _splitmix(state: int) -> int:
    return int(_splitmix_all(np.array([(state + _GOLDEN) & _MASK], dtype=np.uint64))[0])


def _splitmix_all(values: UInt64s) -> UInt64s:
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class Mixture:
    """Sources with their numbers of rows and, if any, their weights. Rows are numbered through all sources."""

    num_rows: tuple[int, ...]
    weights: tuple[float, ...] | None
    seed: int

    def __post_init__(self) -> None:
        if not self.num_rows or min(self.num_rows) < 1:
            raise ValueError(f"every source of a mixture needs a row, got {self.num_rows}")
        if self.weights is not None and len(self.weights) != len(self.num_rows):
            raise ValueError(f"{len(self.weights)} weights for {len(self.num_rows)} sources")

    @property
    def quotas(self) -> tuple[int, ...]:
        """Rows of each source in one epoch.

        Example: 90 and 10 rows with weights 1 and 1 give 50 and 50; without weights 90 and 10.
        """
        if self.weights is None:
            return self.num_rows
        return _apportion(sum(self.num_rows), self.weights)

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.quotas)

    def epoch(self, number: int) -> Int64s:
        """The rows of an epoch in order, numbered through all sources. Pure in (seed, number).

        Returns:
            (epoch_rows,) indices into the concatenation of the sources.
        """
        starts = np.cumsum([0, *self.num_rows])[:-1]
        parts = [
            self._part(source, number * quota, quota) + starts[source] for source, quota in enumerate(self.quotas)
        ]
        rows = np.concatenate(parts)
        return np.take(rows, permutation(len(rows), self.seed, number))

    def _part(self, source: int, start: int, num_rows: int) -> Int64s:
        """Rows [start, start + num_rows) of the endless order of one source."""
        size = self.num_rows[source]
        first, last = start // size, (start + num_rows - 1) // size
        passes = [permutation(size, self.seed, source + 1, which) for which in range(first, last + 1)]
        return np.concatenate(passes)[start - first * size :][:num_rows]


def _apportion(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Split ``total``, which is no less than there are weights; every part is at least 1.

    By weight alone where that leaves nobody without. Else each has one first, and the rest is split by weight.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    parts = _largest_remainders(total, shares)
    if parts.min() < 1:
        parts = 1 + _largest_remainders(total - len(parts), shares)
    return tuple(int(part) for part in parts)


def _largest_remainders(total: int, shares: npt.NDArray[np.float64]) -> Int64s:
    exact = shares * total
    parts = np.floor(exact).astype(np.int64)
    left = total - int(parts.sum())
    parts[np.argsort(-(exact - parts), kind="stable")[:left]] += 1
    return parts


def advance(cursor: Cursor, num_rows: int, epoch_rows: int) -> Cursor:
    """The cursor ``num_rows`` rows on."""
    epochs, position = divmod(cursor.position + num_rows, epoch_rows)
    return replace(cursor, epoch=cursor.epoch + epochs, position=position, drawn=cursor.drawn + num_rows)
