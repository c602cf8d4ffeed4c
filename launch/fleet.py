"""Several rollout engines behind one handle that keeps each of them busy.

Invariants:

- A prompt is sent to exactly one engine, with all its samples, so that they share the prefix.
- An engine never holds more than ``prompts_in_flight_per_engine`` prompts; what is over waits here, where it can
  still go to whichever engine is free first.
- Prompts leave in slices that shrink towards the end of a batch, to a quarter of the largest: the last ones decide
  when a batch is done, so they are spread over all engines instead of queueing behind one. Thinner ones would cost
  the driver and every scoring role a call for next to nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from actors.rollout import RolloutActor, RolloutInfo
from cluster.group import Ref, RoleGroup

#: Maps an engine's rank, a PROMPTS batch and rows of it to a ROLLOUT of one row each.
Baseline = Callable[[int, Ref, list[int]], Awaitable[Ref]]
#: The same, to a ROLLOUT and what the driver knows of it.
Answer = Callable[[int, Ref, list[int]], Awaitable[tuple[Ref, RolloutInfo]]]


@dataclass(frozen=True)
class Generated:
    """One finished slice: its rows of the ROLLOUT schema by reference, and what the driver knows of them.

    ``prompts`` holds the rows of its prompts, others beside them. ``baseline`` holds one more response to each of its
    prompts, where the algorithm compares with one.
    """

    rollout: Ref
    info: RolloutInfo
    engine: int
    prompts: Ref
    baseline: Ref | None = None


class RolloutFleet:
    """Hands prompts to the least loaded engine.

    Args:
        engines: the engines, one rank each.
        prompts_in_flight_per_engine: prompts that an engine may hold.
        largest_slice: prompts sent in one call, at most.
        on_dispatch: told of each slice as it leaves: its prompt ids and the engine's rank.
        baseline: gives one more response to rows of prompts, while an engine (of this rank) answers them.
        answer: how an engine (of this rank) is asked; none: by ``RolloutActor.generate``.
    """

    def __init__(
        self,
        engines: RoleGroup[RolloutActor],
        *,
        prompts_in_flight_per_engine: int,
        largest_slice: int,
        on_dispatch: Callable[[Sequence[int], int], None],
        baseline: Baseline | None = None,
        answer: Answer | None = None,
    ) -> None:
        self.engines = engines
        self._capacity = prompts_in_flight_per_engine
        self._largest_slice = min(largest_slice, prompts_in_flight_per_engine)
        self._smallest_slice = -(-self._largest_slice // 4)
        self._on_dispatch = on_dispatch
        self._baseline = baseline
        self._answer = answer or self._generate
        self._in_flight = [0] * engines.num_ranks
        self._changed = asyncio.Condition()
        self._busy_since = 0.0
        self._busy_s = 0.0

    def take_busy_s(self) -> float:
        """Seconds in which any engine had a prompt, since this was last asked."""
        now = time.perf_counter()
        busy = self._busy_s + (now - self._busy_since if self.prompts_in_flight else 0.0)
        self._busy_s, self._busy_since = 0.0, now
        return busy

    @property
    def prompts_in_flight(self) -> int:
        """Prompts that the engines hold now."""
        return sum(self._in_flight)

    async def generate(
        self, prompts: Ref, prompt_ids: Sequence[int], rows_of_prompts: Sequence[int] | None = None
    ) -> AsyncIterator[Generated]:
        """Generate for rows of a PROMPTS batch (all, or those given), whose ids are ``prompt_ids``; yields slices as
        they finish.

        Raises:
            ClusterError: an engine failed or was silent; the slices that had not come are lost with it.
        """
        running: set[asyncio.Task[Generated]] = set()
        wanted = range(len(prompt_ids)) if rows_of_prompts is None else rows_of_prompts
        first = 0
        try:
            while first < len(prompt_ids) or running:
                while first < len(prompt_ids):
                    size = self._slice(len(prompt_ids) - first)
                    engine = self._least_loaded(size)
                    if engine is None:
                        break
                    rows = list(wanted[first : first + size])
                    if not self.prompts_in_flight:
                        self._busy_since = time.perf_counter()
                    self._in_flight[engine] += size
                    self._on_dispatch(prompt_ids[first : first + size], engine)
                    running.add(asyncio.create_task(self._run(engine, prompts, rows)))
                    first += size
                if not running:  # another batch holds the engines
                    async with self._changed:
                        await self._changed.wait()
                    continue
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            await _cancel(running)

    async def _run(self, engine: int, prompts: Ref, rows: list[int]) -> Generated:
        try:
            answers = self._answer(engine, prompts, rows)
            if self._baseline is None:
                (rollout, info), baseline = await answers, None
            else:
                (rollout, info), baseline = await asyncio.gather(answers, self._baseline(engine, prompts, rows))
        finally:
            self._in_flight[engine] -= len(rows)
            if not self.prompts_in_flight:
                self._busy_s += time.perf_counter() - self._busy_since
            async with self._changed:
                self._changed.notify_all()
        return Generated(rollout, info, engine, prompts, baseline)

    def _generate(self, engine: int, prompts: Ref, rows: list[int]) -> Awaitable[tuple[Ref, RolloutInfo]]:
        return self.engines.column_of(engine, RolloutActor.generate, prompts, rows)

    def _slice(self, remaining: int) -> int:
        """Guided self-scheduling: half of an even share of what remains, within the limits."""
        share = -(-remaining // (2 * self.engines.num_ranks))
        return min(self._largest_slice, max(share, self._smallest_slice), remaining)

    def _least_loaded(self, size: int) -> int | None:
        engine = min(range(len(self._in_flight)), key=lambda i: (self._in_flight[i], i))
        return engine if self._in_flight[engine] + size <= self._capacity else None


async def _cancel(tasks: Iterable[asyncio.Task[Generated]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
