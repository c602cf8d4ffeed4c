"""A service as a reward, over HTTP. docs/rewards.md has the protocol; ``server`` is one end of it, this is the other.

Invariants:

- A request is sent ``num_attempts`` times at most, to an endpoint that it was not at before where there is one, and of
  these to the one that has the least to do; the wait before each further attempt is drawn from a range that doubles.
- An endpoint that answers by something other than the protocol is treated as one that does not answer.
- An endpoint that has too much to do gets no request until its pause is over. To wait for that is no attempt, within
  bounds.
- Every request that is sent again is counted, and told in the log with what the endpoint did.
- What an endpoint says is wrong with one sample is that sample's failure, and no other's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from actors.errors import RewardError
from actors.rewards.config import HttpRewardConfig
from actors.rewards.endpoints import Endpoints
from actors.rewards.face import Answer, Reason, RewardFailure, RewardSample, TextReward, checked, to_json

logger = logging.getLogger(__name__)

OVERLOADED, UNAVAILABLE = 429, 503
#: What says that the request itself is wrong: any endpoint would say so.
REFUSALS = frozenset({400, 413, 422})


@dataclass(frozen=True)
class _Fault:
    """Why an attempt gave nothing.

    Another one may help where ``again``, after ``wait_s``; the endpoint is to blame where ``blamed``, and wants to be
    left alone where ``pause_s`` is not None. It counts as an attempt where ``counts``.
    """

    failure: RewardFailure
    again: bool = True
    blamed: bool = True
    counts: bool = True
    wait_s: float = 0.0
    pause_s: float | None = None


class HttpReward(TextReward):
    """A service with one or several endpoints.

    Raises:
        RewardError: the environment lacks the variable that holds the token.
    """

    def __init__(self, config: HttpRewardConfig) -> None:
        self._config = config
        self.samples_per_call = config.batch_size
        self._headers = {}
        if (name := config.token_variable) is not None:
            if name not in os.environ:
                raise RewardError(f"token_variable {name} is not in the environment of this role's processes")
            self._headers = {"Authorization": f"Bearer {os.environ[name]}"}
        self._endpoints = Endpoints(
            config.endpoints,
            num_failures_to_open=config.num_failures_to_open,
            cooldown_s=config.cooldown_s,
            backoff_s=config.backoff_s,
            max_backoff_s=config.max_backoff_s,
        )
        self._slots = asyncio.Semaphore(config.num_concurrent)
        self._session: aiohttp.ClientSession | None = None
        self._failed_tries = Counter[str]()

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """One answer for each sample."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
            # The slots bound the connections. The wait for one would be part of the request's time.
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        size = self.samples_per_call
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
        num_tries = Counter[str]()
        attempt, patient_until = 0, time.monotonic() + config.num_attempts * config.max_backoff_s
        while True:
            found = await self._attempt(session, body, len(samples), num_tries)
            if not isinstance(found, _Fault):
                return found
            if found.counts or time.monotonic() > patient_until:
                attempt += 1
                if attempt == config.num_attempts or not found.again:
                    return [found.failure] * len(samples)
                self._failed_tries[str(found.failure.reason)] += len(samples)
                if found.blamed:
                    logger.warning("%s; %d samples are sent again", found.failure.detail, len(samples))
            longest = min(config.max_backoff_s, config.backoff_s * 2 ** max(attempt - 1, 0))
            await asyncio.sleep(max(random.uniform(0, longest), found.wait_s))

    async def _attempt(
        self, session: aiohttp.ClientSession, body: bytes, num_samples: int, num_tries: Counter[str]
    ) -> list[Answer] | _Fault:
        async with self._slots:
            url = self._endpoints.take(num_tries)
            if url is None:
                overloaded, wait_s = self._endpoints.overloaded, self._endpoints.wait_s()
                why = "every endpoint has failed too often or has too much to do, and is left alone for a while"
                failure = RewardFailure(Reason.UNREACHABLE, why)
                return _Fault(failure, blamed=False, counts=not overloaded, wait_s=wait_s)
            num_tries[url] += 1
            answered: bool | None = None
            pause_s: float | None = None
            try:
                found = await _post(session, url, body, num_samples)
                if isinstance(found, _Fault):
                    answered, pause_s = False if found.blamed else None, found.pause_s
                else:
                    answered = True
            except TimeoutError:
                answered = False
                why = f"{url} gave no answer in {self._config.timeout_s} s"
                return _Fault(RewardFailure(Reason.TIMED_OUT, why))
            except aiohttp.ClientError as error:
                answered = False
                return _Fault(RewardFailure(Reason.UNREACHABLE, f"{url}: {type(error).__name__}: {error}"))
            finally:
                self._endpoints.give_back(url, answered=answered, pause_s=pause_s)
            return found


async def _post(
    session: aiohttp.ClientSession, url: str, body: bytes, num_samples: int
) -> list[Answer] | _Fault:
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/score", data=body, headers=headers) as response:
        text = await response.read()
        status = response.status
        said = f"{url} answered {status}: {text[:200].decode(errors='replace')}"
        if status == OVERLOADED or (status == UNAVAILABLE and "Retry-After" in response.headers):
            given = response.headers.get("Retry-After", "")
            pause_s = float(given) if given.isdecimal() else 0.0
            return _Fault(RewardFailure(Reason.UNREACHABLE, said), blamed=False, pause_s=pause_s)
        if status in REFUSALS:
            return _Fault(RewardFailure(Reason.REFUSED, said), again=False, blamed=False)
        if status != 200:
            return _Fault(RewardFailure(Reason.UNREACHABLE, said))
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
