"""A real Ray of several nodes on this machine, whose GPU groups are a resource named ``gpu_slot``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: The ranks' processes must find the roles of the tests beside them.
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join((str(HERE), str(ROOT)))}
STORE_BYTES = 100 << 20

sys.path.insert(0, str(HERE))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    """A head without room, and three nodes of 4 CPUs and 2 slots."""
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(num_cpus=4, resources={"gpu_slot": 2}, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
