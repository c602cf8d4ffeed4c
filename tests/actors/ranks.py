"""Processes that play the ranks of a role, kept for a whole test session: starting one costs seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster.context import RankContext

TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def context(rank: int = 0, num_ranks: int = 1, port: int = 0, role: str = "policy") -> RankContext:
    return RankContext(
        role=role,
        rank=rank,
        num_ranks=num_ranks,
        local_rank=rank,
        master_address="127.0.0.1",
        master_port=port or free_port(),
        device="cpu",
        num_threads=1,
        log_dir=None,
        seed=0,
    )


def _serve(pipe: Connection, own: RankContext, log: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((True, function(own, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    """``run(function, *arguments)`` calls ``function(context, *arguments)`` in every rank's process."""

    def __init__(self, num_ranks: int, log_dir: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes, self._processes = [], []
        for rank in range(num_ranks):
            mine, theirs = spawn.Pipe()
            own = context(rank, num_ranks, port)
            process = spawn.Process(target=_serve, args=(theirs, own, log_dir / f"rank-{rank}.log"), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank; the first failure as an AssertionError with its traceback."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: list[Any] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                failures.append(f"rank {rank} is silent")
                continue
            done, result = pipe.recv()
            (results if done else failures).append(result)
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(5)
            process.kill()


