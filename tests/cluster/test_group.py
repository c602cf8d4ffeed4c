"""Supervised ranks on real Ray: what a call carries, and what the driver hears when a rank fails, dies or hangs."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest
import ray
import ray.cloudpickle

from cluster.config import ClusterConfig, PlacementConfig
from cluster.context import RankContext
from cluster.errors import RoleFailed, RoleTimeout
from cluster.group import RoleGroup, RoleSpec
from cluster.placement import Placement, place, plan_bundles
from launch.checkpoint import CheckpointStore
from launch.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets and log files of Ray's daemons
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

T = TypeVar("T")


class AwkwardError(Exception):
    """Cannot be unpickled: its constructor takes more than its message."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


class Worker:
    """A role with one method for each thing that can happen."""

    def __init__(self, context: RankContext, fails: str = "") -> None:
        if fails:
            raise ValueError(fails)
        self.context = context

    def about(self) -> tuple[RankContext, int, str | None]:
        return self.context, os.getpid(), os.environ.get("OMP_NUM_THREADS")

    def accelerators(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def echo(self, value: object) -> object:
        return value

    def raise_on(self, rank: int) -> None:
        if self.context.rank == rank:
            logging.getLogger("worker").warning("about to fail")
            raise ValueError("bad row 7")
        time.sleep(15)

    def save(self, folder: Path) -> None:
        (folder / f"rank-{self.context.rank}").mkdir(parents=True)

    def raise_awkward(self) -> None:
        raise AwkwardError("no", "here")

    def die(self, rank: int) -> None:
        if self.context.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)
        raise ConnectionError("connection closed by peer")

    def crash_loudly(self) -> None:
        os.write(2, b"terminate called: the reason\n")
        ctypes.string_at(0)

    def hang(self, rank: int) -> int:
        if self.context.rank == rank:
            time.sleep(60)
        return self.context.rank

    def make(self, num_values: int) -> tuple[pa.RecordBatch, int]:
        return pa.record_batch({"a": pa.array(range(num_values))}), num_values

    def total(self, batches: Sequence[pa.RecordBatch]) -> int:
        return sum(sum(batch.column("a").to_pylist()) for batch in batches)

    def addresses(self, batches: Sequence[pa.RecordBatch]) -> list[int]:
        return [batch.column("a").buffers()[1].address for batch in batches]

    def items(self, num_items: int, fails: bool) -> Iterator[pa.RecordBatch]:
        self.num_made = 0
        for index in range(num_items):
            self.num_made += 1
            yield pa.record_batch({"a": pa.array([index])})
        if fails:
            raise ValueError("stream broke")

    def made(self) -> int:
        return self.num_made


class AsyncWorker:
    """A role whose methods are coroutines."""

    def __init__(self, context: RankContext) -> None:
        self.together = 0
        self.event = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    async def meet(self, num: int, batches: Sequence[pa.RecordBatch]) -> tuple[pa.RecordBatch, int]:
        self.together += 1
        if self.together == num:
            self.event.set()
        await self.event.wait()
        return pa.record_batch({"a": pa.array([1])}), sum(batch.num_rows for batch in batches)

    async def items(self, num_items: int) -> AsyncIterator[pa.RecordBatch]:
        for index in range(num_items):
            await asyncio.sleep(0)
            yield pa.record_batch({"a": pa.array([index])})
        raise ValueError("stream broke")


class Stage:
    """A placement of two ranks, one a node, and what was started in it."""

    def __init__(self, placement: Placement, wanted: PlacementConfig, config: ClusterConfig, log_dir: Path) -> None:
        self.placement, self.wanted, self.config, self.log_dir = placement, wanted, config, log_dir

    async def start(self, role_class: type[T], *args: Any, is_async: bool = False) -> RoleGroup[T]:
        spec = RoleSpec("worker", self.wanted, 3, self.log_dir, environment={}, is_async=is_async)
        return await RoleGroup.start(role_class, spec, self.placement, self.config, args)


@pytest.fixture
async def stage(config: ClusterConfig, tmp_path: Path) -> AsyncIterator[Stage]:
    wanted = PlacementConfig(num_nodes=2, gpus_per_rank=1, threads_per_rank=3, strategy="STRICT_SPREAD")
    placement = await place(plan_bundles({"worker": wanted}, "gpu_slot"), config)
    try:
        yield Stage(placement, wanted, config, tmp_path / "logs")
    finally:
        placement.release()
        while ray.available_resources().get("gpu_slot") != ray.cluster_resources()["gpu_slot"]:
            await asyncio.sleep(0.1)


def where_stored(ref: ray.ObjectRef) -> list[str]:
    """Nodes whose object store holds an object; empty for one that came inside a reply."""
    until = time.monotonic() + 1  # the store reports some milliseconds after the call's reply
    while True:
        nodes: list[str] = ray.experimental.get_object_locations([ref])[ref]["node_ids"]
        if nodes or time.monotonic() > until:
            return nodes
        time.sleep(0.01)


def own_memory() -> int:
    """Bytes of objects that Ray keeps in this process's own memory."""
    return int(ray._private.worker.global_worker.core_worker.get_local_memory_store_bytes_used())


async def test_contexts_results_and_columns(stage: Stage) -> None:
    group = await stage.start(Worker)
    told = await group.call(Worker.about)
    contexts = [context for context, _, _ in told]
    assert [(c.rank, c.local_rank, c.num_ranks) for c in contexts] == [(0, 0, 2), (1, 0, 2)]
    assert len({(c.master_address, c.master_port) for c in contexts}) == 1
    assert {(c.role, c.device, c.num_threads, c.seed) for c in contexts} == {("worker", "cpu", 3, 3)}
    assert {threads for _, _, threads in told} == {"3"}
    assert await group.call_one(1, Worker.echo, "x") == "x"

    # A column of a few bytes: in the store of the node that made it, not in this process, and the info by value.
    await group.columns(Worker.make, 3)
    before = own_memory()
    columns = await group.columns(Worker.make, 5)
    assert [info for _, info in columns] == [5, 5]
    stored = [where_stored(ref) for ref, _ in columns]
    assert all(len(nodes) == 1 for nodes in stored) and stored[0] != stored[1]
    assert own_memory() - before < 200
    refs = [ref for ref, _ in columns]
    assert await group.call(Worker.total, refs) == [20, 20]
    assert not any(ray.get_runtime_context().get_node_id() in where_stored(ref) for ref in refs)
    big, _ = await group.column_of(0, Worker.make, 50_000)
    first, again = [(await group.call_one(0, Worker.addresses, [big]))[0] for _ in range(2)]
    assert first == again, "mapped, not copied"


async def test_columns_survive_their_maker(stage: Stage) -> None:
    group = await stage.start(Worker)
    small, _ = await group.column_of(0, Worker.make, 4)
    for rank in group.ranks:
        ray.kill(rank.handle)
    await asyncio.sleep(1)
    assert ray.get(small, timeout=10).num_rows == 4


async def test_first_failure_stops_the_call(stage: Stage) -> None:
    group = await stage.start(Worker)
    started = time.monotonic()
    with pytest.raises(RoleFailed) as failed:
        await group.call(Worker.raise_on, 1)
    assert time.monotonic() - started < 5
    message = str(failed.value)
    assert failed.value.rank == 1 and message.startswith("worker rank 1 (node ")
    assert "bad row 7" in message and "in raise_on" in message and "about to fail" in message


async def test_a_rank_that_cannot_write_its_part_of_a_checkpoint(stage: Stage, tmp_path: Path) -> None:
    group = await stage.start(Worker)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    with store.writing(1) as folder:
        await group.call(Worker.save, folder)
    with pytest.raises(CheckpointError, match=r"step 2 .*worker rank \d .*NotADirectoryError: .*step-00000001 is as"):  # noqa: SIM117
        with store.writing(2) as folder:
            (folder / "worker").write_text("in the way")
            await group.call(Worker.save, folder / "worker")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


async def test_an_exception_that_cannot_be_pickled(stage: Stage) -> None:
    group = await stage.start(Worker)
    with pytest.raises(RoleFailed, match="AwkwardError: no at here"):
        await group.call_one(0, Worker.raise_awkward)


async def test_failure_to_construct(stage: Stage) -> None:
    with pytest.raises(RoleFailed, match="no such model") as failed:
        await stage.start(Worker, "no such model")
    assert "node ?" not in str(failed.value)


async def test_a_killed_rank_is_named_not_its_peer(stage: Stage) -> None:
    group = await stage.start(Worker)
    _, pid, _ = await group.call_one(1, Worker.about)
    started = time.monotonic()
    with pytest.raises(RoleFailed) as failed:
        await group.call(Worker.die, 1)
    assert time.monotonic() - started < 10
    assert failed.value.rank == 1
    assert str(pid) in str(failed.value)


async def test_native_crash_leaves_its_words_in_the_log(stage: Stage) -> None:
    group = await stage.start(Worker)
    with pytest.raises(RoleFailed, match="terminate called: the reason"):
        await group.call_one(0, Worker.crash_loudly)


async def test_a_silent_rank_is_named(stage: Stage) -> None:
    group = replace(await stage.start(Worker), call_timeout_s=2.0)
    with pytest.raises(RoleTimeout) as silent:
        await group.call(Worker.hang, 1)
    assert silent.value.silent == (1,)
    assert "Worker.hang" in str(silent.value) and "within 2 s" in str(silent.value)


async def test_streams(stage: Stage) -> None:
    group = await stage.start(Worker)
    refs = []
    async for ref in group.stream(0, Worker.items, 3, False):
        assert len(where_stored(ref)) == 1
        refs.append(ref)
    assert [ray.get(ref).column("a").to_pylist() for ref in refs] == [[0], [1], [2]]
    assert await group.call_one(0, Worker.made) == 3


async def test_a_stream_that_breaks(stage: Stage) -> None:
    group = await stage.start(Worker)
    refs = []
    with pytest.raises(RoleFailed, match="stream broke") as failed:
        async for ref in group.stream(0, Worker.items, 2, True):
            refs.append(ref)
    assert len(refs) == 2 and failed.value.rank == 0


async def test_async_ranks_work_together(stage: Stage) -> None:
    group = await stage.start(AsyncWorker, is_async=True)
    batch = ray.put(pa.record_batch({"a": pa.array([1, 2])}))
    answers = await asyncio.gather(*(group.column_of(0, AsyncWorker.meet, 4, [batch]) for _ in range(4)))
    assert [info for _, info in answers] == [2] * 4
    assert all(len(where_stored(ref)) == 1 for ref, _ in answers)
    refs = []
    with pytest.raises(RoleFailed, match="stream broke"):
        async for ref in group.stream(0, AsyncWorker.items, 3):
            refs.append(ref)
    assert [ray.get(ref).column("a").to_pylist() for ref in refs] == [[0], [1], [2]]


async def test_arguments_by_name_are_refused(stage: Stage) -> None:
    group = await stage.start(Worker)
    with pytest.raises(TypeError, match="given by position, got \\['value'\\] by name"):
        await group.call(Worker.echo, value=3)
