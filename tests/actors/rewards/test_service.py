"""Services as rewards, over real sockets: slow ones, failing ones, ones that answer nonsense, ones that go away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from actors.errors import RewardError
from actors.rewards.config import HttpRewardConfig
from actors.rewards.endpoints import Endpoints
from actors.rewards.face import Answer, RewardFailure, RewardSample
from actors.rewards.service import HttpReward
from tests.actors.ranks import free_port


def sample(response: str) -> RewardSample:
    return RewardSample("P", response, True, {"answer": 1})


def brief(answers: list[Answer]) -> list[float | str]:
    return [str(answer.reason) if isinstance(answer, RewardFailure) else answer for answer in answers]


class Server:
    """An endpoint that gives each response its length, or whatever ``behave`` gives; it counts its requests."""

    def __init__(self, behave: Callable[[int, list[Any]], Awaitable[Any]] | None = None) -> None:
        self.num_requests = 0
        self.num_samples = 0
        self.headers: dict[str, str] = {}
        self._behave = behave

    @asynccontextmanager
    async def up(self) -> AsyncIterator[str]:
        application = web.Application()
        application.add_routes([web.post("/score", self._score)])
        self.runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self.runner.setup()
        port = free_port()
        await web.TCPSite(self.runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{port}"
        await self.runner.cleanup()

    async def _score(self, request: web.Request) -> web.StreamResponse:
        self.num_requests += 1
        self.headers = dict(request.headers)
        samples = json.loads(await request.read())["samples"]
        self.num_samples += len(samples)
        good = [{"score": float(len(one["response"]))} for one in samples]
        given = None if self._behave is None else await self._behave(self.num_requests, good)
        if isinstance(given, web.Response):
            return given
        return web.Response(text=json.dumps({"results": good if given is None else given}))


def reward(*urls: str, **changes: Any) -> HttpReward:
    small = {"batch_size": 2, "backoff_s": 0.01, "cooldown_s": 0.2, "timeout_s": 0.5, "num_attempts": 3}
    return HttpReward(HttpRewardConfig(endpoints=urls, **(small | changes)))


async def scored(service: HttpReward, responses: list[str]) -> list[float | str]:
    try:
        return brief(await service.score([sample(response) for response in responses]))
    finally:
        await service.close()


async def test_batches_are_balanced_and_answers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "hunter2")
    one, two = Server(), Server()
    async with one.up() as first, two.up() as second:
        responses = ["x" * place for place in range(21)]
        service = reward(first, second, token_variable="REWARD_TOKEN")
        assert await scored(service, responses) == [float(place) for place in range(21)]
    assert sorted((one.num_requests, two.num_requests)) == [5, 6] and one.num_samples + two.num_samples == 21
    assert one.headers["Authorization"] == "Bearer hunter2"
    with pytest.raises(RewardError, match="token_variable NOT_SET"):
        reward("http://127.0.0.1:1", token_variable="NOT_SET")


async def _error_500(_: int, __: list[Any]) -> Any:
    return web.Response(status=500, text="out of memory")


async def _error_400(_: int, __: list[Any]) -> Any:
    return web.Response(status=400, text="no such thing")


async def _error_413(_: int, __: list[Any]) -> Any:
    return web.Response(status=413, text="too large")


async def _error_422(_: int, __: list[Any]) -> Any:
    return web.Response(status=422, text="not of the schema")


async def _error_401(_: int, __: list[Any]) -> Any:
    return web.Response(status=401, text="who are you")


async def _error_404(_: int, __: list[Any]) -> Any:
    return web.Response(status=404, text="default backend - 404")


async def _always_429(_: int, __: list[Any]) -> Any:
    return web.Response(status=429)


async def _steady(_: int, __: list[Any]) -> None:
    await asyncio.sleep(0.02)


async def _slow(_: int, __: list[Any]) -> None:
    await asyncio.sleep(5)


async def _one_short(_: int, good: list[Any]) -> Any:
    return good[1:]


async def _not_json(_: int, __: list[Any]) -> Any:
    return web.Response(text="<html>")


async def _other_json(_: int, __: list[Any]) -> Any:
    return web.Response(text="[1, 2]")


async def _mixed(_: int, good: list[Any]) -> Any:
    return [good[0], {"score": float("nan")}, {"score": None}, {"error": "too long"}, {"points": 3}, 2.0]


async def _second_time(number: int, _: list[Any]) -> Any:
    return web.Response(status=503) if number == 1 else None


async def _overloaded(number: int, _: list[Any]) -> Any:
    return web.Response(status=429, headers={"Retry-After": "1"}) if number == 1 else None


async def _not_ready(number: int, _: list[Any]) -> Any:
    return web.Response(status=503, headers={"Retry-After": "1"}) if number == 1 else None


@pytest.mark.parametrize(
    ("behave", "expected", "num_requests"),
    [
        (_error_500, ["unreachable"] * 6, 3),
        (_error_400, ["refused"] * 6, 1),
        (_error_413, ["refused"] * 6, 1),
        (_error_422, ["refused"] * 6, 1),
        (_error_401, ["unreachable"] * 6, 3),
        (_error_404, ["unreachable"] * 6, 3),
        (_always_429, ["unreachable"] * 6, 3),
        (_slow, ["timed_out"] * 6, 3),
        (_one_short, ["wrong_length"] * 6, 3),
        (_not_json, ["unreadable"] * 6, 3),
        (_other_json, ["unreadable"] * 6, 3),
        (_mixed, [1.0, "not_finite", "wrong_type", "raised", "wrong_type", "wrong_type"], 1),
        (_second_time, [1.0] * 6, 2),
        (_overloaded, [1.0] * 6, 2),
        (_not_ready, [1.0] * 6, 2),
    ],
)
async def test_an_endpoint_that_misbehaves(
    behave: Callable[[int, list[Any]], Awaitable[Any]], expected: list[float | str], num_requests: int
) -> None:
    server = Server(behave)
    async with server.up() as url:
        assert await scored(reward(url, batch_size=6, max_backoff_s=0.3), ["x"] * 6) == expected
    assert server.num_requests == num_requests


@pytest.mark.parametrize("behave", [_error_404, _error_401, _always_429, _error_500])
async def test_an_endpoint_that_refuses_at_once_does_not_attract_the_requests(
    behave: Callable[[int, list[Any]], Awaitable[Any]],
) -> None:
    good, bad = Server(_steady), Server(behave)
    async with good.up() as first, bad.up() as second:
        service = reward(first, second, batch_size=1, num_attempts=2, backoff_s=0.2, cooldown_s=10.0)
        assert await scored(service, ["x"] * 60) == [1.0] * 60  # the second attempt is at the other one
    assert good.num_requests == 60 and bad.num_requests <= 8


async def test_an_endpoint_with_a_limit_of_its_own_is_waited_for() -> None:
    under_way = 0

    async def two_at_a_time(_: int, __: list[Any]) -> Any:
        nonlocal under_way
        if under_way == 2:
            return web.Response(status=429)
        under_way += 1
        await asyncio.sleep(0.02)
        under_way -= 1

    async with Server(two_at_a_time).up() as url:
        # So many wait behind each of its refusals that they could not all be tries.
        service = reward(url, batch_size=1, num_concurrent=3, num_attempts=8, backoff_s=0.05)
        assert await scored(service, ["x"] * 40) == [1.0] * 40


async def test_a_refused_request_says_nothing_of_its_endpoint() -> None:
    async def behave(number: int, _: list[Any]) -> Any:
        return web.Response(status=413 if number % 2 else 500)

    server = Server(behave)
    async with server.up() as url:
        service = reward(url, num_failures_to_open=2, num_attempts=1, num_concurrent=1, cooldown_s=10.0)
        answers = [brief(await service.score([sample("x")]))[0] for _ in range(5)]
        await service.close()
    # Neither does it count as a failure, nor does it make good those before it.
    assert answers == ["refused", "unreachable", "refused", "unreachable", "unreachable"] and server.num_requests == 4


async def test_as_many_requests_are_under_way_as_are_configured() -> None:
    num_waiting, all_there = 0, asyncio.Event()

    async def wait_for_all(_: int, __: list[Any]) -> None:
        nonlocal num_waiting
        num_waiting += 1
        if num_waiting == 120:  # more than the connections that aiohttp has by itself
            all_there.set()
        await all_there.wait()

    async with Server(wait_for_all).up() as url:
        service = reward(url, batch_size=1, num_concurrent=120, timeout_s=10.0, num_attempts=1)
        assert await scored(service, ["x"] * 120) == [1.0] * 120


async def test_a_request_that_is_given_up_says_nothing_of_its_endpoint() -> None:
    async def first_for_ever(number: int, _: list[Any]) -> None:
        await asyncio.sleep(5 if number == 1 else 0)

    async with Server(first_for_ever).up() as url:
        service = reward(url, batch_size=1, num_failures_to_open=1, cooldown_s=10.0, timeout_s=5.0, num_attempts=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.score([sample("x")]), 0.5)
        assert await scored(service, ["x"]) == [1.0]


async def test_an_endpoint_that_goes_down_in_mid_run_costs_no_sample(caplog: pytest.LogCaptureFixture) -> None:
    staying, leaving = Server(_steady), Server()

    async def leave(number: int, _: list[Any]) -> None:
        if number == 3:
            asyncio.get_running_loop().call_soon(asyncio.ensure_future, leaving.runner.cleanup())
            await asyncio.sleep(5)

    leaving._behave = leave
    async with staying.up() as first, leaving.up() as second:
        service = reward(first, second, num_concurrent=4, num_attempts=6)
        assert await scored(service, ["x"] * 60) == [1.0] * 60
    assert 3 <= leaving.num_requests <= 6 and staying.num_requests >= 60 / 2 - 6
    tries = service.take_failed_tries()
    assert tries.total() >= 2 and set(tries) <= {"unreachable", "timed_out"} and not service.take_failed_tries()
    said = [record.message for record in caplog.records if second in record.message]
    assert any("2 samples are sent again" in line for line in said)
    assert any("failed 3 times in a row: it is left alone" in line for line in said)


async def test_with_no_endpoint_left_samples_fail_and_one_that_comes_back_is_used() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    service = reward(url, num_failures_to_open=2, num_attempts=4)
    began = time.monotonic()
    answers = await service.score([sample("x")] * 2)
    assert brief(answers) == ["unreachable"] * 2
    assert 0.2 < time.monotonic() - began < 3  # it waited for the endpoint to be tried again
    server = Server()
    server.runner = web.AppRunner(web.Application())
    application = web.Application()
    application.add_routes([web.post("/score", server._score)])
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(url.rpartition(":")[2])).start()
    assert await scored(service, ["xy"]) == [2.0]
    await runner.cleanup()


def of_endpoints(urls: list[str], now: list[float]) -> Endpoints:
    waits = {"cooldown_s": 10, "backoff_s": 2, "max_backoff_s": 5}
    return Endpoints(urls, num_failures_to_open=2, **waits, clock=lambda: now[0])


def test_an_open_circuit_is_tried_by_one_request_after_its_cooldown() -> None:
    now = [0.0]
    endpoints = of_endpoints(["a", "b"], now)
    assert [endpoints.take(), endpoints.take(), endpoints.take()] == ["a", "b", "a"]
    for answered in (False, False):
        endpoints.give_back("a", answered=answered)
    assert [endpoints.take(), endpoints.take()] == ["b", "b"]
    for _ in range(3):
        endpoints.give_back("b", answered=False)
    assert endpoints.take() is None and endpoints.wait_s() == 10
    now[0] = 10
    assert [endpoints.take(), endpoints.take(), endpoints.take()] == ["a", "b", None]
    endpoints.give_back("a", answered=False)  # one more failure opens it at once
    assert endpoints.take() is None
    endpoints.give_back("b", answered=True)
    assert [endpoints.take(), endpoints.take()] == ["b", "b"]


def test_an_overloaded_endpoint_is_left_out_for_a_while_and_not_blamed() -> None:
    now = [0.0]
    endpoints = of_endpoints(["a", "b"], now)
    pauses = []
    for wanted_s in (0.0, 0.0, 0.0, 60.0):
        assert endpoints.take({"b": 1}) == "a" and endpoints.take({"b": 1}) == "a"
        endpoints.give_back("a", answered=None, pause_s=wanted_s)
        endpoints.give_back("a", answered=None, pause_s=wanted_s)  # said of the same moment: it is one pause
        before = now[0]
        while endpoints.take({"b": 1}) == "b":
            endpoints.give_back("b", answered=True)
            now[0] += 1
        pauses.append(now[0] - before)
        endpoints.give_back("a", answered=None)
    assert pauses == [2, 4, 5, 5]  # doubled, up to the longest
    endpoints.take({"b": 1})
    endpoints.give_back("a", answered=True)
    endpoints.take({"b": 1})
    endpoints.give_back("a", answered=None, pause_s=3.0)
    endpoints.take()
    endpoints.give_back("b", answered=False)
    assert endpoints.take() == "b"
    endpoints.give_back("b", answered=False)
    # What it asks for, where that is longer than the backoff, which an answer has set back.
    assert endpoints.take() is None and endpoints.wait_s() == 3 and endpoints.overloaded
    now[0] += 3
    assert endpoints.take() == "a"
    for _ in range(2):
        endpoints.give_back("a", answered=False)
    assert endpoints.take() is None and not endpoints.overloaded


def test_another_try_goes_to_an_endpoint_that_was_not_tried() -> None:
    endpoints = of_endpoints(["a", "b"], [0.0])
    endpoints.take()
    assert endpoints.take() == "b"
    assert endpoints.take({"a": 1}) == "b" and endpoints.take({"a": 1}) == "b"  # though it has more to do
    assert endpoints.take({"a": 1, "b": 2}) == "a"
