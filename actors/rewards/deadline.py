"""A reward's answers by a deadline: what is late by then has timed out, and what works on it is ended.

A role that does not answer a call in time ends the run. A reward that hangs on some samples must not: those have no
score, and the others keep theirs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

from actors.rewards.face import Answer, Reason, RewardFailure, RewardSample, TextReward

logger = logging.getLogger(__name__)

#: How long a call that is left may take to end what it started.
END_TIMEOUT_S = 5.0


async def answers_by(deadline: float, reward: TextReward, samples: Sequence[RewardSample]) -> list[Answer]:
    """One answer for each sample, in their order. Asks for ``reward.samples_per_call`` of them at a time, all at once.

    Args:
        deadline: by the clock of the running loop, in seconds; infinite: there is none.

    Raises:
        RewardError: the reward cannot score anything as it is configured; the other calls are ended.
    """
    size = reward.samples_per_call
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    if not parts:
        return []
    tasks = [asyncio.create_task(reward.score(part)) for part in parts]
    late = set(tasks)
    try:
        left_s = None if math.isinf(deadline) else max(0.0, deadline - asyncio.get_running_loop().time())
        done, late = await asyncio.wait(tasks, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await _end(late)
    errors = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
    if errors:
        raise errors[0]
    why = "no answer when the time of the whole call was up (cluster.call_timeout_s)"
    answers: list[Answer] = []
    for task, part in zip(tasks, parts, strict=True):
        found = [RewardFailure(Reason.TIMED_OUT, why)] * len(part) if task in late else task.result()
        assert len(found) == len(part), f"{type(reward).__name__}: {len(found)} answers for {len(part)} samples"
        answers += found
    return answers


async def _end(tasks: set[asyncio.Task[list[Answer]]]) -> None:
    for task in tasks:
        task.cancel()
    if not tasks:
        return
    ended, others = await asyncio.wait(tasks, timeout=END_TIMEOUT_S)
    for task in ended:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("a call that was left ended with %s: %s", type(error).__name__, error)
    if others:
        logger.warning("%d calls do not end %g s after they were left", len(others), END_TIMEOUT_S)
