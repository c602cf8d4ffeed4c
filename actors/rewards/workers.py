"""Processes that run a reward's calls, one at a time each, and are killed where a call does not end.

Invariants:

- A call has an answer by its deadline: scores, or failures that say so.
- A process that was killed, or died, is replaced by a fresh one before the next call; it takes no other call with it.
- A call that is cancelled has its process killed.
- No process outlives the pool, or the process that the pool is in.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress

from actors.errors import RewardError
from actors.rewards.face import JSON, Answer, Reason, RewardFailure, RewardSample, to_json

LONGEST_LINE = 1 << 28
START_TIMEOUT_S = 120.0


class WorkerPool:
    """Processes of ``actors.rewards.worker``, started when they are first wanted."""

    def __init__(self, task: Mapping[str, JSON], *, num_workers: int, timeout_s: float) -> None:
        self._task = json.dumps(dict(task))
        self._timeout_s = timeout_s
        self._free: asyncio.Queue[Process | None] = asyncio.Queue()
        for _ in range(num_workers):
            self._free.put_nowait(None)
        self._processes: set[Process] = set()

    async def call(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """Have a free process answer, or wait for one.

        Raises:
            RewardError: the process cannot start, or the reward cannot score anything as it is configured.
        """
        process = await self._free.get()
        try:
            if process is None or process.returncode is not None:
                try:
                    process = await self._start()
                except OSError as error:  # no memory for it, or too many processes: maybe not for long
                    why = f"its process did not start: {error}"
                    return [RewardFailure(Reason.CRASHED, why)] * len(samples)
            line = json.dumps([to_json(sample) for sample in samples]).encode() + b"\n"
            try:
                answered = await asyncio.wait_for(_exchange(process, line), self._timeout_s)
            except TimeoutError:
                await self._kill(process)
                return [RewardFailure(Reason.TIMED_OUT, f"no answer in {self._timeout_s} s")] * len(samples)
            except asyncio.CancelledError:
                await self._kill(process)
                raise
            if not answered:
                await self._kill(process)
                why = f"its process ended with code {process.returncode}; what it said is in this rank's log"
                return [RewardFailure(Reason.CRASHED, why)] * len(samples)
        finally:
            # One that was killed may not be known to be dead yet.
            self._free.put_nowait(process if process in self._processes else None)
        return _read(json.loads(answered))

    async def close(self) -> None:
        """Kill all."""
        for process in tuple(self._processes):
            await self._kill(process)

    async def _start(self) -> Process:
        words = (sys.executable, "-m", "actors.rewards.worker", self._task)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        process = await asyncio.create_subprocess_exec(
            *words, stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True, limit=LONGEST_LINE
        )
        self._processes.add(process)
        assert process.stdout is not None, "it is a pipe"
        try:
            ready = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        except TimeoutError:
            ready = b""
        except asyncio.CancelledError:
            await self._kill(process)
            raise
        if not ready:
            await self._kill(process)
            raise RewardError(f"the process of a reward, {' '.join(words[1:])}, cannot start; this rank's log says why")
        return process

    async def _kill(self, process: Process) -> None:
        self._processes.discard(process)
        with suppress(ProcessLookupError):
            # The whole session: a function may have started processes of its own.
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _exchange(process: Process, line: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None, "they are pipes"
    try:
        process.stdin.write(line)
        await process.stdin.drain()
        return await process.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return b""


def _read(answers: object) -> list[Answer]:
    if isinstance(answers, dict):
        raise RewardError(str(answers["error"]))
    assert isinstance(answers, list), "the worker gives a list, or an error"
    return [RewardFailure(Reason(one[0]), one[1]) if isinstance(one, list) else float(one) for one in answers]
