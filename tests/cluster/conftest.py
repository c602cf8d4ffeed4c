"""One Ray cluster of three raylets on this machine, with accelerators emulated by a custom resource."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig

STORE_BYTES = 80 << 20


@pytest.fixture(scope="module")
def raylets() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes of 6 CPUs and 4 accelerators; this process is connected to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves log files and sockets of its daemons open
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=6, resources={"gpu_slot": 4}, object_store_memory=STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        cluster.wait_for_nodes()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def config(raylets: Cluster) -> ClusterConfig:
    return ClusterConfig(
        address=raylets.address,
        accelerator_resource="gpu_slot",
        placement_timeout_s=20,
        start_timeout_s=40,
        call_timeout_s=20,
    )
