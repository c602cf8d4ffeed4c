"""Which endpoint of a service a request goes to: the one with the least under way, of those that answer.

An endpoint is *closed* (in use), or *open* after ``num_failures_to_open`` failures in a row: it is left alone for
``cooldown_s`` seconds, and then tried by one request at a time until one of them succeeds (the circuit breaker of
Nygard, Release It!, 2007).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class _Endpoint:
    url: str
    num_in_flight: int = 0
    num_failures: int = 0
    retry_at: float = 0.0
    num_served: int = 0


class Endpoints:
    """The endpoints of one service."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        num_failures_to_open: int,
        cooldown_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoints = [_Endpoint(url) for url in urls]
        self._num_failures_to_open = num_failures_to_open
        self._cooldown_s = cooldown_s
        self._clock = clock

    def take(self) -> str | None:
        """An endpoint for one request, which ``give_back`` must follow; none where all are left alone."""
        free = [endpoint for endpoint in self._endpoints if self._wait_s(endpoint) <= 0]
        if not free:
            return None
        # Of equals, the one that has had the least to do.
        chosen = min(free, key=lambda endpoint: (endpoint.num_in_flight, endpoint.num_served))
        chosen.num_in_flight += 1
        chosen.num_served += 1
        return chosen.url

    def give_back(self, url: str, *, answered: bool) -> None:
        """The request is over. ``answered`` is false where the endpoint is to blame."""
        endpoint = next(endpoint for endpoint in self._endpoints if endpoint.url == url)
        endpoint.num_in_flight -= 1
        if answered and endpoint.num_failures >= self._num_failures_to_open:
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

    def _wait_s(self, endpoint: _Endpoint) -> float:
        if endpoint.num_failures < self._num_failures_to_open:
            return 0.0
        left = endpoint.retry_at - self._clock()
        if left > 0:
            return left
        # One request tries it; the others wait for what becomes of that.
        return self._cooldown_s if endpoint.num_in_flight else 0.0
