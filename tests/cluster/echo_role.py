"""Roles that do next to nothing, or go wrong in the way they are told to."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator

import pyarrow as pa
import ray

from cluster.context import RankContext


class Echo:
    """A role whose ranks can be told apart."""

    def __init__(self, context: RankContext, offset: int) -> None:
        if offset < 0:
            raise ValueError(f"offset must not be negative, got {offset}")
        self._context = context
        self._offset = offset

    def add(self, number: int) -> int:
        return self._context.rank * 100 + self._offset + number

    def where(self) -> tuple[str, dict[str, float]]:
        return ray.get_runtime_context().get_node_id(), ray.get_runtime_context().get_assigned_resources()

    def pid(self) -> int:
        return os.getpid()

    def column(self, given: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, int]:
        return pa.record_batch({"x": [self._context.rank]}), sum(batch.num_rows for batch in given)

    def items(self, count: int) -> Iterator[dict[str, int]]:
        for number in range(count):
            yield {"number": number}

    def number_of(self, item: dict[str, int]) -> int:
        return item["number"]

    def fail_on(self, rank: int) -> None:
        if self._context.rank == rank:
            logging.getLogger(__name__).info("about to fail")
            raise ValueError("boom")
        time.sleep(30)

    def die_on(self, rank: int) -> None:
        if self._context.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    def hang_on(self, rank: int) -> int:
        if self._context.rank == rank:
            time.sleep(30)
        return rank

    def meet(self) -> tuple[str, int]:
        with socket.socket() as meeting:
            meeting.bind((self._context.master_address, self._context.master_port))
        return self._context.master_address, self._context.master_port


class AsyncEcho:
    """A role whose calls run side by side."""

    def __init__(self, context: RankContext) -> None:
        self._running = self._most = 0

    async def wait(self, seconds: float) -> int:
        self._running += 1
        self._most = max(self._most, self._running)
        await asyncio.sleep(seconds)
        self._running -= 1
        return self._most
