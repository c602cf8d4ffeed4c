"""What a reward tells beside its column of scores: the samples that it has none for. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.reports import ColumnInfo

logger = logging.getLogger(__name__)

MOST_NAMED = 5


@dataclass(frozen=True)
class SampleFailure:
    """A sample that got no score of its own, after all tries."""

    sample_id: int
    prompt_id: int
    reason: str
    detail: str
    dropped: bool


@dataclass(frozen=True)
class RewardInfo(ColumnInfo):
    """One rank's part of a reward's column.

    ``num_failed_tries`` counts by reason, tries that a later one made good included; ``num_retried`` counts samples
    tried again, once for each time. ``num_tokens`` are of prompts and responses.
    """

    failures: tuple[SampleFailure, ...]
    num_failed_tries: Mapping[str, int]
    num_retried: int

    @property
    def dropped(self) -> dict[int, str]:
        """The prompts whose groups are to be left out, each with a reason for the ledger."""
        return {failure.prompt_id: f"reward {failure.reason}" for failure in self.failures if failure.dropped}

    @property
    def num_failures(self) -> dict[str, int]:
        """Samples without a score of their own, by reason."""
        counts: dict[str, int] = {}
        for failure in self.failures:
            counts[failure.reason] = counts.get(failure.reason, 0) + 1
        return counts


def log_failures(role: str, failures: Sequence[SampleFailure], instead: object = None) -> None:
    """Name the first ones in this rank's log.

    Args:
        instead: the score that those are given that are not dropped.
    """
    for failure in failures[:MOST_NAMED]:
        logger.warning(
            "%s: sample %d of prompt %d has no score (%s: %s) and is %s",
            role,
            failure.sample_id,
            failure.prompt_id,
            failure.reason,
            failure.detail,
            "dropped" if failure.dropped else f"given {instead}",
        )
    if len(failures) > MOST_NAMED:
        logger.warning("%s: and %d more samples", role, len(failures) - MOST_NAMED)
