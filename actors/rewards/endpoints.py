"""Which endpoint of a service a request goes to: the one with the least under way, of those that answer.

An endpoint is *closed* (in use), or *open* after ``num_failures_to_open`` failures in a row: it is left alone for
``cooldown_s`` seconds, and then tried by one request at a time until one of them succeeds (the circuit breaker of
Nygard, Release It!, 2007). One that says that it has too much to do is left out for a while, and not blamed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class _Endpoint:
    url: str
    num_in_flight: int = 0
    num_failures: int = 0
    retry_at: float = 0.0
    num_pauses: int = 0
    paused_until: float = 0.0
    num_served: int = 0


class Endpoints:
    """The endpoints of one service."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        num_failures_to_open: int,
        cooldown_s: float,
        backoff_s: float,
        max_backoff_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoints = [_Endpoint(url) for url in urls]
        self._num_failures_to_open = num_failures_to_open
        self._cooldown_s = cooldown_s
        self._backoff_s, self._max_backoff_s = backoff_s, max_backoff_s
        self._clock = clock

    def take(self, num_tries: Mapping[str, int] | None = None) -> str | None:
        """An endpoint for one request, which ``give_back`` must follow; none where all are left alone.

        Args:
            num_tries: how often the request was at each endpoint before; those with fewer go first.
        """
        free = [endpoint for endpoint in self._endpoints if self._wait_s(endpoint) <= 0]
        if not free:
            return None
        tried = num_tries or {}
        # Of equals, the one that has had the least to do.
        chosen = min(free, key=lambda one: (tried.get(one.url, 0), one.num_in_flight, one.num_served))
        chosen.num_in_flight += 1
        chosen.num_served += 1
        return chosen.url

    def give_back(self, url: str, *, answered: bool | None, pause_s: float | None = None) -> None:
        """The request is over.

        Args:
            answered: false where the endpoint is to blame; none where it says nothing of the endpoint.
            pause_s: where the endpoint has too much to do, for how long it wants to be left alone; 0 where it does not
                say. It is left alone for the backoff at least, doubled each time until it answers, and for
                ``max_backoff_s`` at most.
        """
        endpoint = next(endpoint for endpoint in self._endpoints if endpoint.url == url)
        endpoint.num_in_flight -= 1
        if pause_s is not None:
            self._pause(endpoint, pause_s)
        if answered is None:
            return
        if answered:
            endpoint.num_pauses = 0
            if endpoint.num_failures >= self._num_failures_to_open:
                logger.info("%s answers again", url)
        endpoint.num_failures = 0 if answered else endpoint.num_failures + 1
        if endpoint.num_failures >= self._num_failures_to_open:
            endpoint.retry_at = self._clock() + self._cooldown_s
        if not answered and endpoint.num_failures == self._num_failures_to_open:
            logger.warning(
                "%s failed %d times in a row: it is left alone, and tried every %g s",
                url,
                endpoint.num_failures,
                self._cooldown_s,
            )

    def wait_s(self) -> float:
        """How long until an endpoint may be tried; 0 where one may be now."""
        return min(self._wait_s(endpoint) for endpoint in self._endpoints)

    @property
    def overloaded(self) -> bool:
        """Whether an endpoint is left out for no other reason than that it has too much to do."""
        return any(self._pause_s(endpoint) > 0 >= self._broken_s(endpoint) for endpoint in self._endpoints)

    def _pause(self, endpoint: _Endpoint, pause_s: float) -> None:
        now = self._clock()
        if now < endpoint.paused_until:
            return  # the request was under way when it said so first
        least = self._backoff_s * 2 ** min(endpoint.num_pauses, 64)
        pause_s = min(max(pause_s, least), self._max_backoff_s)
        endpoint.num_pauses += 1
        endpoint.paused_until = now + pause_s
        logger.info("%s has too much to do: it is left alone for %g s", endpoint.url, pause_s)

    def _wait_s(self, endpoint: _Endpoint) -> float:
        return max(self._pause_s(endpoint), self._broken_s(endpoint))

    def _pause_s(self, endpoint: _Endpoint) -> float:
        return max(0.0, endpoint.paused_until - self._clock())

    def _broken_s(self, endpoint: _Endpoint) -> float:
        if endpoint.num_failures < self._num_failures_to_open:
            return 0.0
        left = endpoint.retry_at - self._clock()
        if left > 0:
            return left
        # One request tries it; the others wait for what becomes of that.
        return self._cooldown_s if endpoint.num_in_flight else 0.0
