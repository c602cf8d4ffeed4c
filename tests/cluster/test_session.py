"""Joining and leaving Ray, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig
from cluster.session import cluster_address

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets and log files of Ray's daemons
PROGRAM = """
import sys, time
import ray
from cluster.config import ClusterConfig
from cluster.session import connect
with connect(ClusterConfig(address=sys.argv[1], object_store_bytes=80 << 20), num_cpus_wanted=5.5):
    print(int(ray.cluster_resources().get("CPU", 0)), ray.get_runtime_context().gcs_address, flush=True)
    time.sleep(float(sys.argv[2]))
assert not ray.is_initialized()
"""


def environment(**values: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), **values}


def session(address: str, seconds: float = 0, **values: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, address, str(seconds)]
    return subprocess.Popen(
        command,
        text=True,
        env=environment(**values),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def output(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[str, str]:
    """What a session's process wrote; it is ended where it takes too long."""
    try:
        return process.communicate(timeout=timeout_s)
    finally:
        process.kill()


def test_auto_starts_ray_here_with_as_many_cpus_as_wanted() -> None:
    out, err = output(session("auto"))
    assert int(out.split()[0]) == max(6, os.cpu_count() or 1), err


def test_auto_joins_what_ray_address_names(raylets: Cluster) -> None:
    # No token settings given: what a driver inside a submitted job finds.
    out, err = output(session("auto", RAY_ADDRESS=raylets.address))
    assert out.split() == ["12", raylets.address], err


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:9", "127.0.0.1:9"), ("http://127.0.0.1:8265", "ray job submit")]
)
def test_an_address_without_a_cluster_is_refused_soon(address: str, said: str) -> None:
    started = time.monotonic()
    _, err = output(session("auto", RAY_ADDRESS=address))
    assert "SessionError" in err and said in err.strip().splitlines()[-1]
    assert time.monotonic() - started < 15


def test_what_this_machine_can_never_hold_is_refused_at_once() -> None:
    program = """
import asyncio, time
from cluster.config import ClusterConfig, PlacementConfig
from cluster.placement import place, plan_bundles
from cluster.session import connect
config = ClusterConfig(address="local", object_store_bytes=80 << 20)
with connect(config, num_cpus_wanted=1):
    started = time.monotonic()
    try:
        asyncio.run(place(plan_bundles({"policy": PlacementConfig(gpus_per_rank=9)}, "GPU"), config))
    except Exception as error:
        print(f"{time.monotonic() - started < 5} {type(error).__name__} {error}")
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, text=True, capture_output=True, env=environment(), timeout=100)
    assert run.stdout.startswith("True PlacementFailed the roles do not fit this machine:"), run.stdout + run.stderr
    assert "policy bundle 0 of 1 needs 1 CPU, 9 GPU" in run.stdout


def test_sigterm_leaves_no_process() -> None:
    process = session("local", 60)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output(process, 30)
    for _ in range(50):
        left = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout.split()
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {left}")


def test_configuration_needs_neither_ray_nor_torch() -> None:
    program = "import sys, cluster.config; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_local_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(ClusterConfig(address="local")) is None
    assert cluster_address(ClusterConfig(address="auto")) == "10.0.0.1:6379"
    assert cluster_address(ClusterConfig(address="10.0.0.2:6379")) == "10.0.0.2:6379"
