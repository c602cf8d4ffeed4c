"""A slice has its answer before the call that asks for it is given up, whatever the reward does."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import pytest

from actors.errors import RewardError
from actors.rewards.config import FunctionRewardConfig
from actors.rewards.deadline import answers_by
from actors.rewards.face import Answer, Reason, RewardFailure, RewardSample, TextReward
from actors.rewards.function import FunctionReward
from actors.rewards.retries import score_with_retries

FAULTY = "tests.actors.rewards.faulty"


def samples(*responses: str) -> list[RewardSample]:
    return [RewardSample("P", response, True, {}) for response in responses]


def brief(answers: Sequence[Answer]) -> list[float | str]:
    return [str(answer.reason) if isinstance(answer, RewardFailure) else answer for answer in answers]


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


class Sleeper(TextReward):
    """Sleeps for as many hundredths of a second as the response says; a negative one waits for ``release`` first."""

    def __init__(self, samples_per_call: int = 1) -> None:
        self.samples_per_call = samples_per_call
        self.sizes: list[int] = []
        self.num_cancelled = 0
        self.release = asyncio.Event()

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        self.sizes.append(len(samples))
        numbers = [float(sample.response) for sample in samples]
        if any(number == 0 for number in numbers):
            raise RewardError("nothing can be scored")
        try:
            await asyncio.sleep(max(map(abs, numbers)) / 100)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            if min(numbers) < 0:
                await self.release.wait()
            raise
        return [*numbers]

    async def close(self) -> None: ...


async def test_what_is_late_timed_out_and_the_rest_has_its_scores() -> None:
    reward = Sleeper(samples_per_call=2)
    answers = await answers_by(soon(1.0), reward, samples("1", "2", "1", "900", "3"))
    assert brief(answers) == [1.0, 2.0, "timed_out", "timed_out", 3.0]
    assert isinstance(answers[3], RewardFailure) and "cluster.call_timeout_s" in answers[3].detail
    assert reward.sizes == [2, 2, 1] and reward.num_cancelled == 1
    assert await answers_by(math.inf, reward, samples("4")) == [4.0] and await answers_by(0.0, reward, []) == []


async def test_what_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("actors.rewards.deadline.END_TIMEOUT_S", 0.1)
    reward, began = Sleeper(), time.monotonic()
    assert brief(await answers_by(soon(1.0), reward, samples("1", "-900"))) == [1.0, "timed_out"]
    assert time.monotonic() - began < 5 and "1 calls do not end" in caplog.text
    reward.release.set()
    await asyncio.sleep(0)


async def test_an_error_ends_all() -> None:
    reward = Sleeper()
    with pytest.raises(RewardError, match="nothing can be scored"):
        await answers_by(soon(5.0), reward, samples("900", "0", "900"))
    assert reward.num_cancelled == 2


async def test_no_try_begins_that_could_not_end() -> None:
    class Raises(Sleeper):
        async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
            await super().score(samples)
            return [RewardFailure(Reason.RAISED)] * len(samples)

    config = FunctionRewardConfig(path="a:b", num_retries=5, retry_wait_s=40.0)
    reward, began = Raises(), time.monotonic()
    scored = await score_with_retries(reward, samples("1", "1"), config, soon(5.0))
    assert time.monotonic() - began < 4 and scored.num_retried == 0
    assert scored.num_failed_tries == {"raised": 2}  # and not `timed_out`: that is not what was wrong


async def test_processes_that_hang_are_killed_and_replaced() -> None:
    config = FunctionRewardConfig(path=f"{FAULTY}:as_told", timeout_s=60.0, retry_wait_s=0.0)
    reward = FunctionReward(config)
    try:
        assert await reward.score(samples("warm")) == [4.0]
        began = time.monotonic()
        scored = await score_with_retries(reward, samples("ok", "hang", "hang", "late"), config, soon(2.0))
        assert time.monotonic() - began < 8 and scored.scores == [2.0, None, None, None]
        assert [failure.reason for failure in scored.failures.values()] == [Reason.TIMED_OUT] * 3
        assert scored.num_failed_tries == {"timed_out": 3} and scored.num_retried == 0
        assert await reward.score(samples("again")) == [5.0]
    finally:
        await reward.close()


async def test_a_process_is_killed_that_is_left_while_it_starts() -> None:
    reward = FunctionReward(FunctionRewardConfig(path=f"{FAULTY}:as_told"))
    assert reward._pool is not None
    assert brief(await answers_by(soon(0.1), reward, samples("ok"))) == ["timed_out"]
    assert not reward._pool._processes
    assert await reward.score(samples("again")) == [5.0]
    await reward.close()
