"""Which cluster a run joins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.session import cluster_address

ROOT = Path(__file__).parents[2]


def test_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(ClusterConfig()) is None
    assert cluster_address(ClusterConfig(address="10.0.0.1:6379")) == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert cluster_address(ClusterConfig()) == "10.0.0.2:6379"
    assert cluster_address(ClusterConfig(address="local")) is None


def test_configuration_loads_neither_ray_nor_torch() -> None:
    program = "import sys, cluster.config, cluster.context; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


PROGRAM = """
import os, ray
from cluster.config import ClusterConfig
from cluster.session import connect
with connect(ClusterConfig(), num_cpus_wanted=7.5):
    print("cpus", int(ray.cluster_resources()["CPU"]))
print("initialized", ray.is_initialized())
"""


def test_a_machine_by_itself_has_as_many_cpus_as_the_roles_want() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["cpus", "8", "initialized", "False"], done.stderr
