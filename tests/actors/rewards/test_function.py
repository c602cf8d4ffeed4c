"""Functions as rewards: what they are given, and what becomes of those that misbehave."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.errors import RewardError
from actors.rewards.binding import load_function
from actors.rewards.config import FunctionRewardConfig
from actors.rewards.face import Answer, RewardFailure, RewardSample
from actors.rewards.function import FunctionReward

FAULTY = "tests.actors.rewards.faulty"


def sample(response: str, **columns: Any) -> RewardSample:
    return RewardSample("P", response, True, columns)


def brief(answers: list[Answer]) -> list[float | str]:
    return [str(answer.reason) if isinstance(answer, RewardFailure) else answer for answer in answers]


async def scored(name: str, samples: list[RewardSample], **config: Any) -> list[Answer]:
    reward = FunctionReward(FunctionRewardConfig(path=f"{FAULTY}:{name}", **config))
    try:
        return await reward.score(samples)
    finally:
        await reward.close()


@pytest.mark.parametrize(
    ("name", "columns", "scores"),
    [
        ("length", {"answer": 1.0}, [1.0, 2.0]),
        ("closer", {"answer": 5.0, "level": 1}, [-3.0, -6.0]),
        ("everything", {"answer": 5.0}, [8.0, 15.0]),
    ],
)
async def test_a_function_is_given_what_it_names(name: str, columns: Mapping[str, Any], scores: list[float]) -> None:
    assert await scored(name, [sample("3", **columns), sample("10", **columns)]) == scores


async def test_a_batched_function_is_given_lists_cut_to_size() -> None:
    samples = [sample(str(place), answer=100.0) for place in range(5)]
    answers = await scored("batch_of_halves", samples, batched=True, batch_size=2, num_workers=2)
    assert answers == [100.0, 100.5, 101.0, 101.5, 102.0]
    assert brief(await scored("one_too_few", samples, batched=True, batch_size=5)) == ["wrong_length"] * 5


async def test_every_misbehaviour_is_a_failure_of_its_sample_alone() -> None:
    told = ["ok", "hang", "die", "raise", "none", "nan", "huge", "text", "shape", "array", "isclose", "true", "fine"]
    began = time.monotonic()
    answers = await scored("as_told", [sample(word) for word in told], timeout_s=1.0)
    wrong = ["timed_out", "crashed", "raised", "wrong_type", "not_finite", "not_finite", *["wrong_type"] * 3]
    assert brief(answers) == [2.0, *wrong, 1.0, 1.0, 4.0]
    assert isinstance(answers[3], RewardFailure) and answers[3].detail == "ValueError: as told"
    assert time.monotonic() - began < 20


async def test_coroutines_run_together_and_are_left_at_the_deadline() -> None:
    began = time.monotonic()
    wrong = [sample("raise"), sample("cancel"), sample("hang")]
    answers = await scored("slow", [sample("x" * 7)] * 40 + wrong, timeout_s=0.5)
    assert brief(answers) == [7.0] * 40 + ["raised", "raised", "timed_out"]
    assert time.monotonic() - began < 2


async def test_a_process_that_cannot_be_had_now_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none_left(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    reward = FunctionReward(FunctionRewardConfig(path=f"{FAULTY}:length"))
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "create_subprocess_exec", none_left)
        assert brief(await reward.score([sample("ab")] * 2)) == ["crashed"] * 2
    assert await reward.score([sample("ab")]) == [2.0]
    await reward.close()


async def test_no_process_outlives_the_reward() -> None:
    reward = FunctionReward(FunctionRewardConfig(path=f"{FAULTY}:length", num_workers=2))
    assert await reward.score([sample("ab")] * 4) == [2.0] * 4
    assert reward._pool is not None
    pids = [process.pid for process in reward._pool._processes]
    assert pids
    await reward.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("name", ["closer", "batch_of_halves"])
async def test_a_column_that_nobody_keeps_ends_the_run(name: str) -> None:
    with pytest.raises(RewardError, match=r"asks for 'answer'; it can be given prompt, response, finished, level"):
        await scored(name, [sample("3", level=1)], batched=name == "batch_of_halves")


def test_functions_are_found_in_modules_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(response):\n    return 4\n")
    assert load_function(f"{file}:score")(response="") == 4
    with pytest.raises(RewardError, match=r"other does not exist; functions of .*mine.py: score"):
        load_function(f"{file}:other")
    with pytest.raises(RewardError, match=r"nowhere cannot be imported: ModuleNotFoundError"):
        load_function("tests.nowhere:score")
    file.write_text("1 / 0\n")
    with pytest.raises(RewardError, match=r"ZeroDivisionError"):
        load_function(f"{file}:score")
    with pytest.raises(ValueError, match=r"package\.module:name"):
        FunctionRewardConfig(path="mine.py")
