"""What roles tell the driver besides references: a few numbers, by value. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ColumnInfo:
    """One rank's part of a column: its rows, the tokens it ran forward over, and the seconds that took."""

    num_rows: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainReport:
    """One iteration (or supervised update): metrics over all ranks, tokens trained on by all ranks, wall seconds."""

    metrics: dict[str, float]
    num_tokens: int
    seconds: float
