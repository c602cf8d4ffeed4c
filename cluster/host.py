"""The Ray actors that roles live in. A role is a plain class; these are all that Ray sees.

Invariants:

- A role is constructed in ``start``, not when the actor is: a failure to load is an ordinary answer with its
  traceback, and the process lives on to be asked about it.
- Arguments that are references, or lists of them, arrive as what they refer to, mapped from the node's object store.
- Every failure is written to the rank's log before it travels to the caller; what its children and native code
  write to the standard streams is there as well.
- A ``Stored`` result never travels inside a reply: it stays in this node's object store until a consumer fetches it,
  and is owned by the caller.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray
from ray import ObjectRef

from cluster.context import RankContext
from cluster.nodes import node_name

T = TypeVar("T")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: Ray replies with objects below its ``max_direct_call_object_size`` (100 KiB) inside the message to the caller.
INLINE_BYTES = 100 * 1024
_PADDING = bytes(INLINE_BYTES)


@dataclass(frozen=True)
class Whereabouts:
    """A process: its node, its id, and where others can meet it: the node's address and a port that is free now."""

    node: str
    pid: int
    address: str
    port: int


class Stored(Generic[T]):
    """A value that Ray keeps in the object store, however small; whoever gets it finds the bare value.

    In its serialised form a small value is padded to the size from which Ray stores. The padding is a buffer of its
    own, which no reader copies.
    """

    def __init__(self, value: T) -> None:
        self._value = value

    def __reduce__(self) -> tuple[object, ...]:
        size = self._value.nbytes if isinstance(self._value, pa.RecordBatch) else 0
        padding = memoryview(_PADDING)[: max(0, INLINE_BYTES - size)]
        return _without_padding, (self._value, pickle.PickleBuffer(padding))


def _without_padding(value: T, padding: object) -> T:
    return value


class _Process(Generic[T]):
    """What both kinds of host share: the role, its log, and who this process is."""

    def __init__(self) -> None:
        self._role: T | None = None
        self._logger = logging.getLogger("troupe")

    @property
    def role(self) -> T:
        """The role, once it has been started."""
        if self._role is None:
            raise RuntimeError("the role was called before it was started")
        return self._role

    def whereabouts(self) -> Whereabouts:
        """Where this process is."""
        address = ray.util.get_node_ip_address()
        node = node_name(address, ray.get_runtime_context().get_node_id())
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            return Whereabouts(node, os.getpid(), address, probe.getsockname()[1])

    def construct(
        self,
        role_class: Callable[..., T],
        context: RankContext,
        args: tuple[Any, ...],
        devices: Sequence[str] | None,
    ) -> None:
        """Open the log and construct the role, which sees the accelerators ``devices`` where they are given."""
        if context.log_dir is not None:
            _log_to(context.log_dir / f"{context.role}-{context.rank}.log")
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self._logger.info("%s rank %d of %d, process %d", context.role, context.rank, context.num_ranks, os.getpid())
        try:
            self._role = role_class(context, *args)
        except BaseException:
            self._logger.exception("%s rank %d could not start", context.role, context.rank)
            raise

    def failed(self, method: Callable[..., Any]) -> None:
        """Write the exception that is being handled into the log."""
        self._logger.exception("%s failed", method.__qualname__)


class Host:
    """A rank that does one thing at a time."""

    def __init__(self) -> None:
        self._process: _Process[Any] = _Process()

    def whereabouts(self) -> Whereabouts:
        """Where this process is."""
        return self._process.whereabouts()

    def start(
        self,
        role_class: Callable[..., Any],
        context: RankContext,
        args: tuple[Any, ...],
        devices: Sequence[str] | None,
    ) -> None:
        """Construct the role."""
        self._process.construct(role_class, context, args, devices)

    def call(self, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call a method of the role."""
        try:
            return method(self._process.role, *_resolved(args))
        except BaseException:
            self._process.failed(method)
            raise

    def column(self, method: Callable[..., tuple[Any, Any]], args: tuple[Any, ...]) -> tuple[Stored[Any], Any]:
        """Call a method that makes a column."""
        column, info = self.call(method, args)
        return Stored(column), info

    def stream(self, method: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> Iterator[Any]:
        """Call a method that yields; each item becomes an object of its own, and a receipt of None follows it."""
        try:
            for item in method(self._process.role, *_resolved(args)):
                yield Stored(item)
                yield None
        except GeneratorExit:
            raise
        except BaseException:
            self._process.failed(method)
            raise


class AsyncHost:
    """A rank with many calls under way at a time, whose role's methods are coroutines."""

    def __init__(self) -> None:
        self._process: _Process[Any] = _Process()

    async def whereabouts(self) -> Whereabouts:
        """Where this process is."""
        return self._process.whereabouts()

    async def start(
        self,
        role_class: Callable[..., Any],
        context: RankContext,
        args: tuple[Any, ...],
        devices: Sequence[str] | None,
    ) -> None:
        """Construct the role."""
        self._process.construct(role_class, context, args, devices)

    async def call(self, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Await a method of the role."""
        try:
            return await method(self._process.role, *[await _awaited(value) for value in args])
        except BaseException:
            self._process.failed(method)
            raise

    async def column(self, method: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Stored[Any], Any]:
        """Await a method that makes a column."""
        column, info = await self.call(method, args)
        return Stored(column), info

    async def stream(self, method: Callable[..., AsyncIterator[Any]], args: tuple[Any, ...]) -> AsyncIterator[Any]:
        """Call a method that yields; each item becomes an object of its own, and a receipt of None follows it."""
        try:
            async for item in method(self._process.role, *[await _awaited(value) for value in args]):
                yield Stored(item)
                yield None
        except GeneratorExit:
            raise
        except BaseException:
            self._process.failed(method)
            raise


def _log_to(path: Path) -> None:
    """Send the standard streams, which child processes inherit, and Python's log to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
    faulthandler.enable(file=sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr, force=True)


def _resolved(args: tuple[Any, ...]) -> list[Any]:
    return [ray.get(value) if _is_reference(value) else value for value in args]


async def _awaited(value: Any) -> Any:
    if isinstance(value, list) and _is_reference(value):
        return [await reference for reference in value]
    return await value if _is_reference(value) else value


def _is_reference(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, ObjectRef) for item in value)
    return isinstance(value, ObjectRef)
