"""The Ray actors that roles live in. A role is a plain class; these are all that Ray sees.

Invariants:

- A role is constructed in ``start``, not when the actor is: a failure to load is an ordinary answer with its
  traceback, and the process lives on to be asked about it.
- Arguments that are references, or lists of them, arrive as what they refer to, mapped from the node's object store.
- Every failure is written to the rank's log before it travels to the caller.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef

from cluster.context import RankContext
from cluster.nodes import node_name

T = TypeVar("T")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def meeting_point() -> tuple[str, int]:
    """The address of this node and a port of it that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


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

    def construct(self, role_class: Callable[..., T], context: RankContext, args: tuple[Any, ...]) -> tuple[str, int]:
        """Open the log and construct the role; returns the node's name and the process id."""
        if context.log_dir is not None:
            context.log_dir.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(context.log_dir / f"{context.role}-{context.rank}.log")
            handler.setFormatter(logging.Formatter(LOG_FORMAT))
            root = logging.getLogger()
            root.addHandler(handler)
            root.setLevel(logging.INFO)
        node = node_name(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
        self._logger.info("%s rank %d of %d on node %s", context.role, context.rank, context.num_ranks, node)
        try:
            self._role = role_class(context, *args)
        except BaseException:
            self._logger.exception("%s rank %d could not start", context.role, context.rank)
            raise
        return node, os.getpid()

    def failed(self, method: Callable[..., Any]) -> None:
        """Write the exception that is being handled into the log."""
        self._logger.exception("%s failed", method.__qualname__)


class Host:
    """A rank that does one thing at a time."""

    def __init__(self) -> None:
        self._process: _Process[Any] = _Process()

    def start(self, role_class: Callable[..., Any], context: RankContext, args: tuple[Any, ...]) -> tuple[str, int]:
        """Construct the role."""
        return self._process.construct(role_class, context, args)

    def call(self, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call a method of the role."""
        try:
            return method(self._process.role, *_resolved(args))
        except BaseException:
            self._process.failed(method)
            raise

    def stream(self, method: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> Iterator[Any]:
        """Call a method that yields; each item becomes an object of its own."""
        try:
            yield from method(self._process.role, *_resolved(args))
        except BaseException:
            self._process.failed(method)
            raise


class AsyncHost:
    """A rank with many calls under way at a time, whose role's methods are coroutines."""

    def __init__(self) -> None:
        self._process: _Process[Any] = _Process()

    async def start(
        self, role_class: Callable[..., Any], context: RankContext, args: tuple[Any, ...]
    ) -> tuple[str, int]:
        """Construct the role."""
        return self._process.construct(role_class, context, args)

    async def call(self, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Await a method of the role."""
        try:
            return await method(self._process.role, *[await _awaited(value) for value in args])
        except BaseException:
            self._process.failed(method)
            raise

    async def stream(self, method: Callable[..., AsyncIterator[Any]], args: tuple[Any, ...]) -> AsyncIterator[Any]:
        """Call a method that yields; each item becomes an object of its own."""
        try:
            async for item in method(self._process.role, *[await _awaited(value) for value in args]):
                yield item
        except BaseException:
            self._process.failed(method)
            raise


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
