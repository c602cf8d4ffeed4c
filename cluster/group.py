"""A role's ranks as one supervised group.

Invariants:

- Methods are given as functions of the role's class (``group.call(PolicyActor.save, folder)``), so calls are typed,
  and found by whoever looks for callers.
- The first failure of any rank ends a call at once and carries that rank's traceback and the end of its log. Other
  ranks may still be at work then; a group that has failed is not to be used again.
- No wait is without a deadline, and a deadline names the ranks that were silent.
- What a column method returns first, or a stream yields, stays in the object store of the rank's node, whatever its
  size: only small things come to the caller. It is owned by the caller, so it outlives the process that made it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar, overload

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig, PlacementConfig
from cluster.context import RankContext
from cluster.errors import RoleFailed, RoleTimeout
from cluster.host import AsyncHost, Host
from cluster.placement import Placement, rank_resources

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
ColumnT = TypeVar("ColumnT")
Ref: TypeAlias = "ray.ObjectRef"
#: A role's method as a function of its class, plain or a coroutine.
Method: TypeAlias = Callable[Concatenate[T, P], R]
AsyncMethod: TypeAlias = Callable[Concatenate[T, P], Coroutine[Any, Any, R]]

STREAM_AHEAD = 2
#: Of a stream's next item Ray can say without fetching it only whether it is there: asked this often, at most.
STREAM_POLL_S = 0.02
#: After a failure, how long a process that died may take to be noticed: its peers often complain before Ray does.
DEATH_NOTICE_S = 1.5
ASYNC_CALLS = 1000
LOG_TAIL_BYTES = 4000


@dataclass(frozen=True)
class _Rank:
    handle: ActorHandle
    node: str
    pid: int
    log: Path | None


@dataclass(frozen=True)
class RoleSpec:
    """How a role's processes are started: where, under which environment, and whether its methods are coroutines."""

    role: str
    placement: PlacementConfig
    seed: int
    log_dir: Path | None = None
    environment: Mapping[str, str] | None = None
    is_async: bool = False


@dataclass(frozen=True)
class RoleGroup(Generic[T]):
    """The ranks of one role."""

    role: str
    ranks: tuple[_Rank, ...]
    call_timeout_s: float

    @classmethod
    async def start(
        cls,
        role_class: Callable[..., T],
        spec: RoleSpec,
        placement: Placement,
        config: ClusterConfig,
        args: Sequence[Any],
    ) -> RoleGroup[T]:
        """Start a process for each rank in its place, and construct ``role_class(context, *args)`` in each.

        Raises:
            RoleFailed: a rank could not be started.
            RoleTimeout: a rank was not there after ``config.start_timeout_s``.
        """
        handles = [_spawn(spec, placement, config, rank) for rank in range(spec.placement.num_ranks)]
        unstarted = cls(spec.role, tuple(_Rank(handle, "?", 0, None) for handle in handles), config.start_timeout_s)
        places = await unstarted._wait("start", dict(enumerate(handle.whereabouts.remote() for handle in handles)))
        contexts = [
            _context(spec, config, rank, places[0].address, places[0].port) for rank in range(len(handles))
        ]
        ranks = tuple(
            _Rank(handle, place.node, place.pid, _log(context))
            for handle, place, context in zip(handles, places, contexts, strict=True)
        )
        await cls(spec.role, ranks, config.start_timeout_s)._wait(
            "start",
            {
                rank: handle.start.remote(role_class, context, tuple(args), placement.devices_of(spec.role, rank))
                for rank, (handle, context) in enumerate(zip(handles, contexts, strict=True))
            },
        )
        return cls(spec.role, ranks, config.call_timeout_s)

    @property
    def num_ranks(self) -> int:
        """Processes of the role."""
        return len(self.ranks)

    @overload
    async def call(self, method: AsyncMethod[T, P, R], *args: P.args, **kwargs: P.kwargs) -> list[R]: ...

    @overload
    async def call(self, method: Method[T, P, R], *args: P.args, **kwargs: P.kwargs) -> list[R]: ...

    async def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method on every rank with the same arguments; returns each rank's answer.

        An argument may be a reference, or a list of references, to what the method takes.

        Raises:
            RoleFailed: a rank raised or died.
            RoleTimeout: a rank was silent.
        """
        calls = {rank: self._submit(rank, method, args, kwargs) for rank in range(self.num_ranks)}
        return await self._wait(method.__qualname__, calls)

    @overload
    async def call_one(self, rank: int, method: AsyncMethod[T, P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    async def call_one(self, rank: int, method: Method[T, P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...

    async def call_one(self, rank: int, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method on one rank. Raises as ``call`` does."""
        return (await self._wait(method.__qualname__, {rank: self._submit(rank, method, args, kwargs)}))[0]

    @overload
    async def columns(
        self, method: AsyncMethod[T, P, tuple[ColumnT, R]], *args: P.args, **kwargs: P.kwargs
    ) -> list[tuple[Ref, R]]: ...

    @overload
    async def columns(
        self, method: Method[T, P, tuple[ColumnT, R]], *args: P.args, **kwargs: P.kwargs
    ) -> list[tuple[Ref, R]]: ...

    async def columns(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[Ref, Any]]:
        """Call a method that makes a column on every rank; returns references to the columns, each with what it says.

        Raises as ``call`` does.
        """
        pairs = [self._submit_column(rank, method, args, kwargs) for rank in range(self.num_ranks)]
        infos = await self._wait(method.__qualname__, {rank: info for rank, (_, info) in enumerate(pairs)})
        return [(column, info) for (column, _), info in zip(pairs, infos, strict=True)]

    @overload
    async def column_of(
        self, rank: int, method: AsyncMethod[T, P, tuple[ColumnT, R]], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Ref, R]: ...

    @overload
    async def column_of(
        self, rank: int, method: Method[T, P, tuple[ColumnT, R]], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Ref, R]: ...

    async def column_of(self, rank: int, method: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Ref, Any]:
        """As ``columns``, of one rank."""
        column, info = self._submit_column(rank, method, args, kwargs)
        return column, (await self._wait(method.__qualname__, {rank: info}))[0]

    async def stream(
        self,
        rank: int,
        method: Callable[Concatenate[T, P], Iterator[R] | AsyncIterator[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> AsyncIterator[Ref]:
        """References to what a method of one rank yields, as it yields; it runs ``STREAM_AHEAD`` items ahead at most.

        Raises as ``call`` does; the deadline is for each item.
        """
        handle = self.ranks[rank].handle
        generator = handle.stream.options(
            num_returns="streaming", _generator_backpressure_num_objects=2 * STREAM_AHEAD
        ).remote(method, _positional(args, kwargs))
        while True:
            (pair,) = await self._wait(method.__qualname__, {rank: _next_pair(generator)})
            if pair is None:
                return
            yield pair

    def _submit(
        self,
        rank: int,
        method: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        return self.ranks[rank].handle.call.remote(method, _positional(args, kwargs))

    def _submit_column(
        self, rank: int, method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Ref, Ref]:
        column, info = self.ranks[rank].handle.column.options(num_returns=2).remote(method, _positional(args, kwargs))
        return column, info

    async def _wait(self, method: str, answers: Mapping[int, Awaitable[Any]]) -> list[Any]:
        """The answers in the order of their ranks, or the first failure, or who was silent."""
        tasks = {asyncio.ensure_future(answer): rank for rank, answer in answers.items()}
        try:
            done, waiting = await asyncio.wait(
                tasks, timeout=self.call_timeout_s, return_when=asyncio.FIRST_EXCEPTION
            )
            if waiting and any(isinstance(task.exception(), RayTaskError) for task in done):
                late, waiting = await asyncio.wait(
                    waiting, timeout=DEATH_NOTICE_S, return_when=asyncio.FIRST_EXCEPTION
                )
                done |= late
            failed = [task for task in tasks if task in done and task.exception() is not None]
            for task in sorted(failed, key=lambda task: not isinstance(task.exception(), RayActorError)):
                error = task.exception()
                if isinstance(error, RayError):
                    raise self._failure(tasks[task], method, error) from error
                if error is not None:
                    raise error
            if waiting:
                silent = sorted(tasks[task] for task in waiting)
                raise RoleTimeout(self.role, method, silent, self.num_ranks, self.call_timeout_s)
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    def _failure(self, rank: int, method: str, error: RayError) -> RoleFailed:
        process = self.ranks[rank]
        raised: BaseException | None = None
        if isinstance(error, RayTaskError):
            raised = error.cause
            what = f"{method} raised {type(error.cause).__name__}: {error.cause}\n{str(error).strip()}"
        elif isinstance(error, RayActorError):
            what = f"its process (pid {process.pid}) died during {method}: {error}"
        else:
            what = f"{method}: {error}"
        return RoleFailed(self.role, rank, process.node, what, _tail(process.log), raised)


def _spawn(spec: RoleSpec, placement: Placement, config: ClusterConfig, rank: int) -> ActorHandle:
    group, bundle = placement.of_rank(spec.role, rank)
    resources = rank_resources(spec.placement, config.accelerator_resource)
    num_gpus = resources.pop("GPU", 0)
    variables = {"OMP_NUM_THREADS": str(spec.placement.num_threads)}
    if not _on_gpu(spec, config):
        variables["CUDA_VISIBLE_DEVICES"] = ""  # else Ray leaves a process without GPUs the sight of all of them
    host = AsyncHost if spec.is_async else Host
    options: dict[str, Any] = {
        "num_cpus": resources.pop("CPU"),
        "num_gpus": num_gpus,
        "resources": resources,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        "runtime_env": {"env_vars": {**variables, **(spec.environment or {})}},
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    if spec.is_async:
        options["max_concurrency"] = ASYNC_CALLS
    return ray.remote(host).options(**options).remote()


def _context(spec: RoleSpec, config: ClusterConfig, rank: int, address: str, port: int) -> RankContext:
    return RankContext(
        role=spec.role,
        rank=rank,
        num_ranks=spec.placement.num_ranks,
        local_rank=rank % spec.placement.ranks_per_node,
        master_address=address,
        master_port=port,
        device="cuda" if _on_gpu(spec, config) else "cpu",
        num_threads=spec.placement.num_threads,
        log_dir=spec.log_dir,
        seed=spec.seed,
        answer_within_s=config.answer_within_s,
    )


def _on_gpu(spec: RoleSpec, config: ClusterConfig) -> bool:
    return spec.placement.gpus_per_rank > 0 and config.accelerator_resource == "GPU"


async def _next_pair(generator: ray.ObjectRefGenerator) -> Ref | None:
    """The next item of a stream once its receipt is there; None at the end.

    Ray's own asynchronous iteration awaits, and so fetches, every item; this asks for items without fetching them.
    An error stands in the place of an item or a receipt.
    """
    item = await _next_object(generator)
    if item is None:
        return None
    receipt = await _next_object(generator)
    await (item if receipt is None else receipt)
    return item


async def _next_object(generator: ray.ObjectRefGenerator) -> Ref | None:
    pause_s = 0.001
    while not generator.next_ready():
        if generator.is_finished():
            return None
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, STREAM_POLL_S)
    return next(generator, None)


def _positional(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    if kwargs:
        raise TypeError(f"arguments of a role's methods are given by position, got {sorted(kwargs)} by name")
    return tuple(args)


def _log(context: RankContext) -> Path | None:
    return None if context.log_dir is None else context.log_dir / f"{context.role}-{context.rank}.log"


def _tail(log: Path | None) -> str:
    """The end of a log, where this machine can see it."""
    if log is None or not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").strip()
