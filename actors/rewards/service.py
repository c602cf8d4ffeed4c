"""A service as a reward, over HTTP. docs/rewards.md has the protocol; ``server`` is one end of it, this is the other.

Invariants:

- A request is sent ``num_attempts`` times at most, to whichever endpoint has the least to do; the wait before each
  further attempt is drawn from a range that doubles.
- An endpoint that answers by something other than the protocol is treated as one that does not answer.
- Every request that is sent again is counted, and told in the log with what the endpoint did.
- What an endpoint says is wrong with one sample is that sample's failure, and no other's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from actors.errors import RewardError
from actors.rewards.config import HttpRewardConfig
from actors.rewards.endpoints import Endpoints
from actors.rewards.face import Answer, Reason, RewardFailure, RewardSample, TextReward, checked, to_json

logger = logging.getLogger(__name__)

OVERLOADED, SERVER_ERRORS = 429, 500


@dataclass(frozen=True)
class _Fault:
    """Why an attempt gave nothing. Another one may help where ``again``; the endpoint is to blame where ``blamed``."""

    failure: RewardFailure
    again: bool = True
    blamed: bool = True
    wait_s: float = 0.0


class HttpReward(TextReward):
    """A service with one or several endpoints.

    Raises:
        RewardError: the environment lacks the variable that holds the token.
    """

    def __init__(self, config: HttpRewardConfig) -> None:
        self._config = config
        self._headers = {}
        if (name := config.token_variable) is not None:
            if name not in os.environ:
                raise RewardError(f"token_variable {name} is not in the environment of this role's processes")
            self._headers = {"Authorization": f"Bearer {os.environ[name]}"}
        self._endpoints = Endpoints(
            config.endpoints, num_failures_to_open=config.num_failures_to_open, cooldown_s=config.cooldown_s
        )
        self._slots = asyncio.Semaphore(config.num_concurrent)
        self._session: aiohttp.ClientSession | None = None
        self._failed_tries = Counter[str]()

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """One answer for each sample."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        size = self._config.batch_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        answers = await asyncio.gather(*(self._batch(self._session, batch) for batch in batches))
        return [answer for batch in answers for answer in batch]

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def take_failed_tries(self) -> Counter[str]:
        """Samples of requests that were sent again, by reason, since the last call."""
        taken, self._failed_tries = self._failed_tries, Counter()
        return taken

    async def _batch(self, session: aiohttp.ClientSession, samples: Sequence[RewardSample]) -> list[Answer]:
        body = json.dumps({"samples": [to_json(sample) for sample in samples]}).encode()
        config = self._config
        fault = _Fault(RewardFailure(Reason.UNREACHABLE))
        for attempt in range(config.num_attempts):
            if attempt:
                self._failed_tries[str(fault.failure.reason)] += len(samples)
                if fault.blamed:
                    logger.warning("%s; %d samples are sent again", fault.failure.detail, len(samples))
                longest = min(config.max_backoff_s, config.backoff_s * 2 ** (attempt - 1))
                await asyncio.sleep(max(random.uniform(0, longest), fault.wait_s))
            found = await self._attempt(session, body, len(samples))
            if not isinstance(found, _Fault):
                return found
            fault = found
            if not fault.again:
                break
        return [fault.failure] * len(samples)

    async def _attempt(
        self, session: aiohttp.ClientSession, body: bytes, num_samples: int
    ) -> list[Answer] | _Fault:
        async with self._slots:
            url = self._endpoints.take()
            if url is None:
                why = "every endpoint has failed too often, and is left alone for a while"
                wait_s = self._endpoints.wait_s()
                return _Fault(RewardFailure(Reason.UNREACHABLE, why), blamed=False, wait_s=wait_s)
            answered = False
            try:
                found = await _post(session, url, body, num_samples, self._config.max_backoff_s)
                answered = not (isinstance(found, _Fault) and found.blamed)
            except TimeoutError:
                why = f"{url} gave no answer in {self._config.timeout_s} s"
                return _Fault(RewardFailure(Reason.TIMED_OUT, why))
            except aiohttp.ClientError as error:
                return _Fault(RewardFailure(Reason.UNREACHABLE, f"{url}: {type(error).__name__}: {error}"))
            finally:
                self._endpoints.give_back(url, answered=answered)
            return found


async def _post(
    session: aiohttp.ClientSession, url: str, body: bytes, num_samples: int, longest_wait_s: float
) -> list[Answer] | _Fault:
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/score", data=body, headers=headers) as response:
        text = await response.read()
        status = response.status
        said = f"{url} answered {status}: {text[:200].decode(errors='replace')}"
        if status == OVERLOADED:
            given = response.headers.get("Retry-After", "")
            wait_s = min(float(given) if given.isdecimal() else 0.0, longest_wait_s)
            return _Fault(RewardFailure(Reason.UNREACHABLE, said), blamed=False, wait_s=wait_s)
        if status >= SERVER_ERRORS:
            return _Fault(RewardFailure(Reason.UNREACHABLE, said))
        if status != 200:
            return _Fault(RewardFailure(Reason.REFUSED, said), again=False, blamed=False)
    try:
        results = json.loads(text)["results"]
    except (ValueError, KeyError, TypeError):
        return _Fault(RewardFailure(Reason.UNREADABLE, f"{said}; an object with a list `results` is expected"))
    if not isinstance(results, list) or len(results) != num_samples:
        given = f"{len(results)} results" if isinstance(results, list) else "no list of results"
        return _Fault(RewardFailure(Reason.WRONG_LENGTH, f"{url} gave {given} for {num_samples} samples"))
    return [_read(result, url) for result in results]


def _read(result: object, url: str) -> Answer:
    if isinstance(result, dict) and "score" in result:
        return checked(result["score"])
    if isinstance(result, dict) and "error" in result:
        return RewardFailure(Reason.RAISED, f"{url}: {result['error']}")
    why = f"{url} gave {result!r} for a sample; an object with `score` or `error` is expected"
    return RewardFailure(Reason.WRONG_TYPE, why)
