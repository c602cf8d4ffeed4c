"""Untrusted code: what it is run for, and everything it tries that it must not get away with."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

import actors.rewards.sandbox as sandbox_module
from actors.errors import RewardError
from actors.rewards.code import CodeReward
from actors.rewards.config import CodeRewardConfig
from actors.rewards.face import Reason, RewardFailure, RewardSample
from actors.rewards.sandbox import Sandbox

#: Does what it can to be overlooked by those who would end it.
ALONE = """import contextlib, ctypes, os, signal, time
with contextlib.suppress(OSError): os.setsid()
ctypes.CDLL(None).prctl(1, 0)"""


def limits(**changes: Any) -> CodeRewardConfig:
    return CodeRewardConfig(**({"timeout_s": 1.0, "cpu_s": 2, "memory_bytes": 256 << 20, "num_workers": 4} | changes))


@pytest.fixture(scope="module", params=["namespaces", "limits"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return started(request.param)


def started(isolation: str, **changes: Any) -> Sandbox:
    # Where the tests run as root, nobody may read the Python that they run on.
    python = "/usr/bin/python3" if isolation == "limits" and os.path.exists("/usr/bin/python3") else None
    try:
        return Sandbox(limits(isolation=isolation, python=python, **changes))
    except RewardError as error:
        pytest.skip(str(error))


def fenced(code: str, **columns: Any) -> RewardSample:
    return RewardSample("", f"Here:\n```python\n{code}\n```", True, columns)


async def test_code_is_scored_by_its_tests() -> None:
    double = "def double(n):\n    return 2 * n"
    tests = ["assert double(2) == 4", "assert double(0) == 0", "assert double(1) == 3"]
    printing = [{"input": "3 4\n", "output": "7"}, {"input": "1 1", "output": "2\n"}]
    adds = "a, b = map(int, input().split())\nprint(a + b)\nexit()"
    samples = [
        fenced(double, tests=tests[:2]),
        fenced(double, tests=tests),
        fenced(double, tests=tests[2]),
        fenced(adds, tests=printing),
        fenced("print(7)", tests=printing),
        fenced("def double(n:", tests=tests),
        RewardSample("", "no code", True, {"tests": "assert True"}),
        fenced("while True: pass", tests="assert True"),
        fenced("eaten = bytearray(1 << 30)", tests="assert True"),
    ]
    scores = [1.0, 2 / 3, 0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert await CodeReward(limits(score="share")).score(samples) == scores
    assert await CodeReward(limits()).score(samples[:2]) == [1.0, 0.0]


async def test_rows_without_tests_are_failures_or_end_the_run() -> None:
    reward = CodeReward(limits())
    for tests in ([], [3], None, [{"input": "x"}]):
        (answer,) = await reward.score([fenced("x = 1", tests=tests)])
        assert isinstance(answer, RewardFailure) and answer.reason is Reason.BAD_ROW
    with pytest.raises(RewardError, match="needs the column 'tests'"):
        await reward.score([fenced("x = 1")])


async def test_a_sandbox_that_does_not_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none_left(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    reward = CodeReward(limits())
    monkeypatch.setattr(asyncio, "create_subprocess_exec", none_left)
    (answer,) = await reward.score([fenced("x = 1", tests="assert x")])
    assert isinstance(answer, RewardFailure) and answer.reason is Reason.CRASHED and "unavailable" in answer.detail


def test_programs_side_by_side_in_the_loop_of_an_actor(sandbox: Sandbox) -> None:
    """Ray runs actors in uvloop, which closes what it is given by the number of its file."""
    ends = {"print(1)": "ended", "exit()": "stopped", "while True: pass": "timed_out"}

    async def outcomes() -> list[str]:
        slots = asyncio.Semaphore(4)

        async def outcome(program: str) -> str:
            async with slots:
                return (await sandbox.run(program)).outcome

        return await asyncio.gather(*(outcome(program) for program in [*["print(1)", "exit()"] * 6, *ends] * 2))

    assert uvloop.run(outcomes()) == [*["ended", "stopped"] * 6, *ends.values()] * 2


def test_a_python_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match="python must name an interpreter"):
        Sandbox(limits(python=str(tmp_path / "none")))
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 20\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sandbox_module, "START_TIMEOUT_S", 0.1)
    with pytest.raises(RewardError, match="none was up in"):
        Sandbox(limits(python=str(sleeper)))


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("while True: pass", "stopped timed_out"),
        ("import time; time.sleep(60)", "timed_out"),
        ("x = bytearray(1 << 30)", "stopped"),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", "stopped"),
        ("while True: print('x' * 1000)", "too_much_output"),
        ("import os\nwhile True: os.fork()", "stopped"),
        ("import threading; threading.Thread(target=print).start()", "stopped"),
        ("import os; os._exit(0)", "stopped"),
        ("import sys; sys.exit(0)", "stopped"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(60)", "stopped timed_out"),
        ("import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass", "stopped timed_out"),
        # Out of the group that is killed at the deadline, and out of the signal that comes with a parent's death.
        (f"{ALONE}; time.sleep(12)", "timed_out"),
        (f"{ALONE}; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(12)", "timed_out"),
        (f"{ALONE}; os.kill(0, signal.SIGKILL); time.sleep(12)", "stopped timed_out"),
        (f"{ALONE}; os.kill(1, signal.SIGTERM); time.sleep(12)", "stopped timed_out"),
        # Memory that is no process's own.
        *(
            (f"import ctypes; c = ctypes.CDLL(None); assert c.{call} >= 0", "stopped")
            for call in ("shmget(0, 1 << 28, 0o1600)", "msgget(0, 0o1600)", "semget(0, 30000, 0o1600)")
        ),
        ("import ctypes; assert ctypes.CDLL('librt.so.1').mq_open(b'/q', 0o102, 0o600, None) >= 0", "stopped"),
        ("import os; assert os.write(os.memfd_create('x'), bytes(8 << 20)) <= 1 << 20", "ended"),
        ("import os; os.truncate(os.memfd_create('x'), 8 << 20)", "stopped"),
        ("open('big', 'wb').write(bytes(8 << 20))", "stopped"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "stopped"),
        ("open('small', 'w').write('fine'); assert open('small').read() == 'fine'", "ended"),
    ],
)
async def test_nothing_runs_on(
    sandbox: Sandbox, program: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = mark_processes(tmp_path, monkeypatch)
    began = time.monotonic()
    run = await sandbox.run(program)
    assert run.outcome in outcome.split()
    assert time.monotonic() - began < 4
    assert not processes(mark)


async def test_with_the_run_its_programs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody is left to end them."""
    sandbox = started("namespaces", timeout_s=30.0)
    mark = mark_processes(tmp_path, monkeypatch)
    says = "ctypes.CDLL(None).prctl(15, b'begun')"  # its name, for those who look from outside
    running = asyncio.ensure_future(sandbox.run(f"{ALONE}; {says}; time.sleep(30)"))
    await until(lambda: "begun" in [name_of(pid) for pid in processes(mark)])
    assert len(processes(mark)) == 3
    [outside] = [pid for pid in processes(mark) if f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{pid}/status").read_text()]
    os.kill(outside, signal.SIGKILL)
    await until(lambda: not processes(mark))
    assert (await running).outcome == "stopped"


async def test_who_holds_on_to_the_output_is_not_waited_for() -> None:
    """Where it can reach others it may hand its standard output on."""
    sandbox = started("limits")
    # Not pytest's folder: others than its user may not enter those above it.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        os.chmod(folder, 0o755)
        path = f"{folder}/socket"
        server.bind(path)
        os.chmod(path, 0o777)
        server.listen()
        gives = f"s = socket.socket(socket.AF_UNIX); s.connect({path!r}); socket.send_fds(s, [b'x'], [1])"
        run = await asyncio.wait_for(sandbox.run(f"import socket, time; {gives}; time.sleep(12)"), 8)
        assert run.outcome == "timed_out"
        held = socket.recv_fds(server.accept()[0], 1, 1)[1]
        assert len(held) == 1
        os.close(held[0])


def mark_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sandboxes begin under a name of their own from now on."""
    mark = folder / "child.py"
    mark.symlink_to(sandbox_module._CHILD)
    monkeypatch.setattr(sandbox_module, "_CHILD", mark)
    return str(mark)


def processes(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def name_of(pid: int) -> str:
    with suppress(OSError):  # it has ended meanwhile
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(8):
        while not reached():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("isolation", ["namespaces", "limits"])
async def test_input_may_be_more_than_the_program_may_write(isolation: str) -> None:
    sandbox = started(isolation, max_output_bytes=4096)
    run = await sandbox.run("print(len(input()))", "x" * 10_000, may_exit=True)
    assert run.output == "10000\n"


async def test_no_secret_of_the_environment_is_seen(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    run = await sandbox.run("import os; print(os.environ.get('SECRET_TOKEN'), sorted(os.listdir('.')))")
    assert run.output == "None []\n"


async def test_within_namespaces_there_is_nobody_else(tmp_path: Path) -> None:
    sandbox = started("namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert (await sandbox.run(reach)).outcome == "stopped"
        socket.create_connection(server.getsockname(), 1).close()  # so it is the namespace that keeps it in
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for path in (tmp_path, secret):
        path.chmod(0o777)
    for attempt in (
        f"import os; os.kill({os.getpid()}, 0)",
        "import os; os.listdir('/proc')",
        f"open({str(secret)!r})",
        f"open({sys.prefix + '/left-by-a-test'!r}, 'w')",
        "open('/left-by-a-test', 'w')",
        "import os; os.setuid(0)",
        "import ctypes; assert not ctypes.CDLL(None).unshare(0x10000000)",  # a space of users, with more memory
        "for number in range(2000): open(str(number), 'w').close()",
        "import os; os.chroot('.')",
    ):
        assert (await sandbox.run(attempt)).outcome == "stopped", attempt
    seen = await sandbox.run("import os; print(os.getpid(), os.getcwd(), 'home' in os.listdir('/'))")
    assert seen.output == "2 /box False\n"
