"""A supervised group of real processes: calls, columns, streams, and every way to fail."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import ray
from conftest import ENVIRONMENT
from echo_role import AsyncEcho, Echo
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig, PlacementConfig
from cluster.errors import RoleFailed, RoleTimeout
from cluster.group import RoleGroup, RoleSpec
from cluster.placement import Placement, place, plan_bundles

CONFIG = ClusterConfig(placement_timeout_s=20, call_timeout_s=30)
TWO = PlacementConfig(ranks_per_node=2, cpus_per_rank=0.5)
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",  # Ray leaves pipes of the processes it started to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::FutureWarning:ray",
)


@pytest_asyncio.fixture
async def placement(ray_cluster: Cluster) -> AsyncIterator[Placement]:
    found = await place(plan_bundles({"echo": TWO}, "GPU"), CONFIG)
    yield found
    found.release()


async def start(placement: Placement, log_dir: Path | None = None, offset: int = 5) -> RoleGroup[Echo]:
    spec = RoleSpec("echo", TWO, 0, log_dir, ENVIRONMENT)
    return await RoleGroup.start(Echo, spec, placement, CONFIG, (offset,))


async def test_calls_columns_and_streams(placement: Placement) -> None:
    group = await start(placement)
    assert await group.call(Echo.add, 3) == [8, 108]
    assert await group.call_one(1, Echo.add, 3) == 108
    columns = await group.columns(Echo.column, [])
    refs = [ref for ref, _ in columns]
    assert [info for _, info in await group.columns(Echo.column, refs)] == [2, 2]
    numbers = [await group.call_one(1, Echo.number_of, ref) async for ref in group.stream(0, Echo.items, 5)]
    assert numbers == [0, 1, 2, 3, 4]
    address, port = await group.call_one(0, Echo.meet)
    assert address and port > 1024


async def test_even_a_tiny_column_stays_in_the_store_and_outlives_its_maker(placement: Placement) -> None:
    group = await start(placement)
    column, _ = await group.column_of(1, Echo.column, [])
    # What Ray had sent through this process's memory would have no node.
    (location,) = ray.experimental.get_object_locations([column]).values()
    assert location["node_ids"]
    os.kill((await group.call_one(1, Echo.pid)), signal.SIGKILL)
    await asyncio.sleep(0.5)
    assert (await column).to_pydict() == {"x": [1]}


async def test_the_first_failure_ends_the_call_and_brings_its_log(placement: Placement, tmp_path: Path) -> None:
    group = await start(placement, tmp_path)
    began = time.monotonic()
    with pytest.raises(RoleFailed, match=r"^echo rank 1 \(node .*\): Echo\.fail_on raised ValueError: boom") as failed:
        await group.call(Echo.fail_on, 1)
    assert time.monotonic() - began < 10
    assert failed.value.rank == 1
    assert 'raise ValueError("boom")' in str(failed.value)
    assert "The end of its log:" in str(failed.value)
    assert "about to fail" in str(failed.value)
    assert "about to fail" in (tmp_path / "echo-1.log").read_text()


async def test_a_killed_process_is_named(placement: Placement) -> None:
    group = await start(placement)
    pid = await group.call_one(0, Echo.pid)
    began = time.monotonic()
    with pytest.raises(RoleFailed, match=rf"echo rank 0 .* its process \(pid {pid}\) died during Echo\.die_on"):
        await group.call(Echo.die_on, 0)
    assert time.monotonic() - began < 10


async def test_silent_ranks_are_named(placement: Placement) -> None:
    group = await start(placement)
    with pytest.raises(RoleTimeout, match=r"Echo\.hang_on had no answer from rank 1 \(of 2\) within 2 s") as late:
        await group.with_deadline(2).call(Echo.hang_on, 1)
    assert late.value.silent == (1,)


async def test_a_role_that_cannot_start_says_why(placement: Placement, tmp_path: Path) -> None:
    with pytest.raises(RoleFailed, match="start raised ValueError: offset must not be negative, got -1"):
        await start(placement, tmp_path, offset=-1)
    assert "could not start" in (tmp_path / "echo-0.log").read_text()


async def test_coroutines_run_side_by_side(placement: Placement) -> None:
    spec = RoleSpec("echo", TWO, 0, environment=ENVIRONMENT, is_async=True)
    group = await RoleGroup.start(AsyncEcho, spec, placement, CONFIG, ())
    most = await asyncio.gather(*(group.call_one(0, AsyncEcho.wait, 0.5) for _ in range(8)))
    assert max(most) == 8


async def test_arguments_by_name_are_refused(placement: Placement) -> None:
    group = await start(placement)
    with pytest.raises(TypeError, match="given by position, got \\['number'\\] by name"):
        await group.call(Echo.add, number=3)
