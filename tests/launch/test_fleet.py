"""How prompts are shared out over several engines. The engines are stand-ins that answer when they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from actors.rollout import RolloutActor, RolloutInfo
from cluster.group import RoleGroup
from launch.fleet import Generated, RolloutFleet


class Engines:
    """Takes calls as a group does, and keeps what each engine holds."""

    def __init__(self, num_ranks: int, seconds: Callable[[int, int], float]) -> None:
        self.num_ranks = num_ranks
        self.held = [0] * num_ranks
        self.most = [0] * num_ranks
        self.calls: list[tuple[int, list[int]]] = []
        self._seconds = seconds

    async def column_of(self, rank: int, method: object, prompts: Any, rows: Sequence[int]) -> tuple[Any, RolloutInfo]:
        assert method is RolloutActor.generate
        self.calls.append((rank, list(rows)))
        self.held[rank] += len(rows)
        self.most[rank] = max(self.most[rank], self.held[rank])
        await asyncio.sleep(self._seconds(rank, len(rows)))
        self.held[rank] -= len(rows)
        ids = tuple(prompts[row] for row in rows)
        return ids, RolloutInfo(ids, len(rows), len(rows), 0, 0, 0.0)


async def generate(engines: Engines, num_prompts: int, capacity: int, largest: int) -> list[Generated]:
    dispatched: list[tuple[tuple[int, ...], int]] = []
    fleet = RolloutFleet(
        cast(RoleGroup[RolloutActor], engines),
        prompts_in_flight_per_engine=capacity,
        largest_slice=largest,
        on_dispatch=lambda ids, engine: dispatched.append((tuple(ids), engine)),
    )
    prompts = [100 + row for row in range(num_prompts)]
    slices = [part async for part in fleet.generate(cast(Any, prompts), prompts)]
    assert fleet.prompts_in_flight == 0
    # Every prompt once, to the engine that the books name.
    assert sorted(prompt for part in slices for prompt in part.info.prompt_ids) == prompts
    assert sorted(dispatched) == sorted((part.info.prompt_ids, part.engine) for part in slices)
    return slices


async def test_no_engine_holds_more_than_it_may() -> None:
    engines = Engines(3, lambda rank, rows: 0.001 * rows)
    await generate(engines, 100, capacity=7, largest=4)
    assert max(engines.most) <= 7
    assert max(len(rows) for _, rows in engines.calls) <= 4


async def test_the_faster_engine_gets_more() -> None:
    engines = Engines(2, lambda rank, rows: (0.002, 0.02)[rank] * rows)
    slices = await generate(engines, 60, capacity=6, largest=6)
    share = [sum(part.info.num_samples for part in slices if part.engine == rank) for rank in range(2)]
    assert share[0] > 2 * share[1]


async def test_the_last_slices_are_thin_and_spread() -> None:
    engines = Engines(4, lambda rank, rows: 0.001 * rows)
    await generate(engines, 67, capacity=64, largest=12)
    sizes = [len(rows) for _, rows in engines.calls]
    # Half of an even share of what remains, down to a quarter of the largest; the last one is what is left.
    assert sizes == [9, 8, 7, 6, 5, 4, 4, *[3] * 8]
    assert {rank for rank, _ in engines.calls[-4:]} == {0, 1, 2, 3}


async def test_two_batches_share_the_engines() -> None:
    engines = Engines(2, lambda rank, rows: 0.001 * rows)
    both = await asyncio.gather(generate(engines, 40, 8, 8), generate(engines, 40, 8, 8))
    assert all(both)


class HalfBroken(Engines):
    """Engine 0 fails at once, the other one takes long."""

    async def column_of(self, rank: int, method: object, prompts: Any, rows: Sequence[int]) -> tuple[Any, RolloutInfo]:
        if rank == 0:
            raise ValueError("engine 0 is gone")
        return await super().column_of(rank, method, prompts, rows)


async def test_a_failure_ends_the_batch() -> None:
    with pytest.raises(ValueError, match="engine 0 is gone"):
        async with asyncio.timeout(5):
            await generate(HalfBroken(2, lambda rank, rows: 30.0), 8, 4, 2)
