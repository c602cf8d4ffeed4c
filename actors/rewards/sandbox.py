"""Runs text that nobody trusts, in a process that is locked up and killed at its deadline.

Invariants:

- The process has none of our environment, files, or standard streams, and a folder of its own, which is gone
  afterwards.
- It is dead, with all that it started, when ``run`` returns.
- What it prints is read up to a bound; beyond it the process is killed.
- That it ended well is believed only with a secret at the end of what it prints. A program that merely ends early does
  not know it; one that goes looking for it in its interpreter finds it, and this is no wall against that.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from actors.errors import RewardError
from actors.rewards.config import CodeRewardConfig

Outcome = Literal["ended", "stopped", "timed_out", "too_much_output", "not_started"]

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0
_CHILD = Path(__file__).parent / "sandbox_child.py"
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # It may start no threads.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Run:
    """How a program fared: it ``ended`` well, ``stopped`` by an exception, a limit or a signal, or did not end.

    ``not_started`` is no fault of the program's: ``output`` says then why.
    """

    outcome: Outcome
    output: str


class Sandbox:
    """Runs programs under the limits of a configuration.

    Raises:
        RewardError: such a process cannot be started here, with the reason and what would do.
    """

    def __init__(self, config: CodeRewardConfig) -> None:
        self._config = config
        secret = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            try:
                tried = subprocess.run(
                    self._words(),
                    input=self._task("import json, random, collections", "", secret, may_exit=False),
                    capture_output=True,
                    cwd=folder,
                    env=_ENVIRONMENT,
                    timeout=START_TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise RewardError(f"no sandbox can be started here: none was up in {START_TIMEOUT_S:g} s") from error
            except OSError as error:
                raise RewardError(
                    f"no sandbox can be started here: {error}; python must name an interpreter that can be run"
                ) from error
        if tried.stdout.decode().split() != [secret] * 2:
            why = (tried.stderr.decode().strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
            right = "isolation: limits does without namespaces"
            if "ModuleNotFoundError" in why:
                right = "everybody must be able to read Python's library, for the code runs as nobody; set python"
            raise RewardError(f"no sandbox can be started here (isolation {config.isolation}): {why}; {right}")

    async def run(self, program: str, given: str = "", *, may_exit: bool = False) -> Run:
        """Run a Python program in a process of its own.

        Args:
            given: its standard input.
            may_exit: ``exit()`` is a good end.
        """
        secret = secrets.token_hex(16)
        task = self._task(program, given, secret, may_exit=may_exit)
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            try:
                with _printing() as (printed, end):
                    process = await asyncio.create_subprocess_exec(
                        *self._words(),
                        stdin=PIPE,
                        stdout=end,
                        stderr=DEVNULL,
                        cwd=folder,
                        env=_ENVIRONMENT,
                        start_new_session=True,
                    )
                    end.close()
                    try:
                        return await self._watched(process, printed, task, secret)
                    finally:
                        await self._end(process)
            except OSError as error:  # no memory for it, or too many processes: maybe not for long
                return Run("not_started", f"{type(error).__name__}: {error}")

    async def _end(self, process: Process) -> None:
        """Kill it, with all that it started, and wait until that is so."""
        assert process.stdin is not None, "it is a pipe"
        process.stdin.close()
        if self._config.isolation == "namespaces":
            # What is inside may have left the group, so the process that stands outside kills and reaps it.
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
        if process.returncode is None:
            logger.error("process %d of a sandbox does not die of SIGKILL", process.pid)

    async def _watched(self, process: Process, stdout: asyncio.StreamReader, task: bytes, secret: str) -> Run:
        assert process.stdin is not None, "it is a pipe"
        try:
            process.stdin.write(task)
            process.stdin.write_eof()
            # The clock starts where the program does.
            first = await asyncio.wait_for(stdout.readline(), START_TIMEOUT_S)
        except (TimeoutError, ConnectionError, ValueError) as error:
            return Run("not_started", f"{type(error).__name__}: {error}")
        if first.decode(errors="replace").strip() != secret:
            return Run("not_started", "the process ended before it ran the program")
        limit = self._config.max_output_bytes + 2 * len(secret)
        printed = bytearray()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                while part := await stdout.read(1 << 16):
                    printed += part
                    if len(printed) > limit:
                        return Run("too_much_output", "")
        except TimeoutError:
            return Run("timed_out", "")
        text = printed.decode(errors="replace")
        ended = text.endswith(f"{secret}\n")
        return Run("ended" if ended else "stopped", text[: -len(secret) - 1] if ended else "")

    def _words(self) -> list[str]:
        return [self._config.python or sys.executable, "-I", "-B", str(_CHILD)]

    def _task(self, program: str, given: str, secret: str, *, may_exit: bool) -> bytes:
        config = self._config
        task = {
            "program": program,
            "input": given,
            "secret": secret,
            "may_exit": may_exit,
            "namespaces": config.isolation == "namespaces",
            "wall_s": math.ceil(START_TIMEOUT_S + config.timeout_s + END_TIMEOUT_S),
            "memory_bytes": config.memory_bytes,
            "cpu_s": config.cpu_s,
            "max_output_bytes": config.max_output_bytes,
        }
        return json.dumps(task).encode()


@contextmanager
def _printing() -> Iterator[tuple[asyncio.StreamReader, IO[bytes]]]:
    """A pipe: what is written to it, and the end to write to. Nobody waits for those who have that end in their hands.

    A process whose output is asyncio's own pipe counts as running until all have closed it. And a transport that is
    given a pipe closes it some time later: with uvloop, which Ray runs actors in, by a number that others have by then.
    """
    loop, stream = asyncio.get_running_loop(), asyncio.StreamReader()
    reading, writing = os.pipe()

    def arrived() -> None:
        part = os.read(reading, 1 << 16)
        if part:
            stream.feed_data(part)
        else:
            loop.remove_reader(reading)
            stream.feed_eof()

    with open(reading, "rb", buffering=0), open(writing, "wb", buffering=0) as far:
        loop.add_reader(reading, arrived)
        try:
            yield stream, far
        finally:
            loop.remove_reader(reading)
