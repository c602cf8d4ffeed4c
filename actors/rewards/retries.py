"""Samples whose scoring failed are tried again; what is left is dropped, or given a configured score. All is counted.

Invariant: every sample ends with a finite score, or with the reason why it has none and is to be dropped, by the
deadline.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from actors.rewards.config import TextRewardConfig
from actors.rewards.deadline import answers_by
from actors.rewards.face import Answer, Reason, RewardFailure, RewardSample, TextReward

#: Reasons that another try does not change.
FINAL = frozenset({Reason.BAD_ROW, Reason.REFUSED})


@dataclass(frozen=True)
class Scored:
    """Answers in the order of the samples, after all tries.

    ``scores`` holds None where a sample is to be dropped; ``failures`` the last failure of every sample that never got
    a score of its own, by its place. ``num_failed_tries`` counts all failures by reason, those that a later try made
    good included; ``num_retried`` the samples tried again, once for each time. Tries that the reward itself made are
    among both.
    """

    scores: list[float | None]
    failures: dict[int, RewardFailure]
    num_failed_tries: dict[str, int]
    num_retried: int


async def score_with_retries(
    reward: TextReward, samples: Sequence[RewardSample], config: TextRewardConfig, deadline: float = math.inf
) -> Scored:
    """Score all samples, and those that failed again, ``config.num_retries`` times.

    Args:
        deadline: by the clock of the running loop, in seconds: what has no answer then has timed out.

    Raises:
        RewardError: the reward cannot score anything as it is configured.
    """
    answers = await answers_by(deadline, reward, samples)
    tries = Counter(_reasons(answers))
    num_retried = 0
    for attempt in range(config.num_retries):
        failed = [at for at, answer in enumerate(answers) if may_be_tried_again(answer)]
        if not failed:
            break
        # Half of it at least, and not all ranks at the same time.
        wait_s = config.retry_wait_s * 2**attempt * random.uniform(0.5, 1.0)
        if asyncio.get_running_loop().time() + wait_s >= deadline:
            break
        await asyncio.sleep(wait_s)
        again = await answers_by(deadline, reward, [samples[at] for at in failed])
        num_retried += len(failed)
        tries.update(_reasons(again))
        tried = dict(zip(failed, again, strict=True))
        answers = [tried.get(at, answer) for at, answer in enumerate(answers)]
    inner = reward.take_failed_tries()
    tries.update(inner)
    num_retried += inner.total()
    failures = {at: answer for at, answer in enumerate(answers) if isinstance(answer, RewardFailure)}
    instead = None if config.on_failure == "drop" else float(config.on_failure)
    scores = [instead if isinstance(answer, RewardFailure) else answer for answer in answers]
    return Scored(scores, failures, dict(tries), num_retried)


def _reasons(answers: Sequence[Answer]) -> list[str]:
    return [str(answer.reason) for answer in answers if isinstance(answer, RewardFailure)]


def may_be_tried_again(answer: Answer) -> bool:
    """Whether it is a failure, and one that another try may change."""
    return isinstance(answer, RewardFailure) and answer.reason not in FINAL
