"""The default run, submitted to a Ray head as an operator does it, with token authentication on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
MARK = "of the submitted tree:"


def free_port() -> int:
    """A port that is free now, out of the range that Ray keeps for its workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def head(home: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """``ray start --head``; gives the environment to submit from."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test-and-of-nothing-else",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TROUPE_HOME": str(home),
    }
    environment.pop("RAY_ADDRESS", None)
    ports = (f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}")
    start = ("ray", "start", "--head", "--block", *ports, "--num-cpus=8")
    log = tmp_path / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(start, env=environment, stdout=output, stderr=output)
    submit = {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        deadline = time.monotonic() + 90
        # The head answers before the agent that runs jobs does.
        words = ("ray", "job", "submit", "--", "true")
        while (trial := subprocess.run(words, env=submit, capture_output=True, text=True, check=False)).returncode:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text() + trial.stdout + trial.stderr
            time.sleep(1)
        yield submit
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.timeout(900)
def test_the_default_run_as_a_job(head: dict[str, str], home: Path, tmp_path: Path) -> None:
    # A checkout: what git knows, without this machine's environment and runs.
    checkout = tmp_path / "checkout"
    listed = subprocess.run(("git", "ls-files"), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    # What is submitted differs from what is installed on this machine, so that it is seen which of the two runs.
    source = checkout / "actors" / "source.py"
    line = '"%s rank %d: %d rows of %s an epoch, '
    assert source.read_text().count(line) == 1
    source.write_text(source.read_text().replace(line, f'"{MARK} %s rank %d: %d rows of %s an epoch, '))
    stranger = {**head, "RAY_AUTH_TOKEN": "another-token"}
    refused = subprocess.run(("ray", "job", "submit", "--", "true"), env=stranger, capture_output=True, check=False)
    assert refused.returncode != 0
    words = ("ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "launch", "train", "ray_config.yaml")
    done = subprocess.run(
        words, cwd=checkout, env=head, capture_output=True, text=True, timeout=600, check=False
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-6000:]
    assert "ppo 1/20" in told and "ppo 20/20" in told
    assert "succeeded" in told
    assert (home / "runs" / "ppo" / "model" / "model.safetensors").exists()
    logs = home / "runs" / "ppo" / "logs"
    assert (logs / "rollout-0.log").exists()
    assert f"{MARK} source rank 0:" in (logs / "source-0.log").read_text(), "not the submitted tree ran"
