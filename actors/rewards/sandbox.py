"""Runs text that nobody trusts, in a process that is locked up and killed at its deadline.

Invariants:

- The process has none of our environment, files, or standard streams, and a folder of its own, which is gone
  afterwards.
- It is dead, with all that it started, when ``run`` returns.
- What it prints is read up to a bound; beyond it the process is killed.
- That it ended well is believed only with a secret that it does not print unless it ran to its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.errors import RewardError
from actors.rewards.config import CodeRewardConfig

Outcome = Literal["ended", "stopped", "timed_out", "too_much_output", "not_started"]

START_TIMEOUT_S = 30.0
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
            tried = subprocess.run(
                self._words(),
                input=self._task("import json, random, collections", "", secret, may_exit=False),
                capture_output=True,
                cwd=folder,
                env=_ENVIRONMENT,
                timeout=START_TIMEOUT_S,
                check=False,
            )
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
                process = await asyncio.create_subprocess_exec(
                    *self._words(),
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=DEVNULL,
                    cwd=folder,
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
            except OSError as error:  # no memory for it, or too many processes: maybe not for long
                return Run("not_started", f"{type(error).__name__}: {error}")
            try:
                return await self._watched(process, task, secret)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    async def _watched(self, process: Process, task: bytes, secret: str) -> Run:
        assert process.stdin is not None and process.stdout is not None, "they are pipes"
        try:
            process.stdin.write(task)
            process.stdin.write_eof()
            # The clock starts where the program does.
            first = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        except (TimeoutError, ConnectionError, ValueError) as error:
            return Run("not_started", f"{type(error).__name__}: {error}")
        if first.decode(errors="replace").strip() != secret:
            return Run("not_started", "the process ended before it ran the program")
        limit = self._config.max_output_bytes + 2 * len(secret)
        printed = bytearray()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                while part := await process.stdout.read(1 << 16):
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
            "memory_bytes": config.memory_bytes,
            "cpu_s": config.cpu_s,
            "max_output_bytes": config.max_output_bytes,
        }
        return json.dumps(task).encode()
