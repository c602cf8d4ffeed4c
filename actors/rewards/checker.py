"""A checker as a reward. It runs in processes of its own: a pattern or a term may take for ever on some response."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.rewards.checkers import checker_of
from actors.rewards.config import CheckerRewardConfig
from actors.rewards.face import Answer, RewardSample, TextReward
from actors.rewards.workers import WorkerPool


class CheckerReward(TextReward):
    """A built-in checker.

    Raises:
        RewardError: its JSON schema is none.
    """

    def __init__(self, config: CheckerRewardConfig) -> None:
        check = config.check.model_dump(mode="json")
        checker_of(check)
        self._pool = WorkerPool({"check": check}, num_workers=config.num_workers, timeout_s=config.timeout_s)

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """One answer for each sample.

        Raises:
            RewardError: the samples lack the column that holds the answer.
        """
        answers = await asyncio.gather(*(self._pool.call([sample]) for sample in samples))
        return [answer for part in answers for answer in part]

    async def close(self) -> None:
        """End the processes."""
        await self._pool.close()
