"""The session with Ray: joining a cluster, or starting one on this machine.

Invariant: on this machine Ray is started with as many logical CPUs as the roles ask for, since they share its cores;
on a cluster what nodes have is what they say they have.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.config import ClusterConfig
from cluster.errors import SessionError

logger = logging.getLogger(__name__)
ANSWER_TIMEOUT_S = 5.0


@contextmanager
def connect(config: ClusterConfig, *, num_cpus_wanted: float) -> Iterator[None]:
    """Join the configured cluster, or start Ray here, for the time of the ``with`` block.

    Args:
        num_cpus_wanted: cores that all roles set aside together.

    Raises:
        SessionError: the address answers no Ray, or refuses the token.
    """
    cluster = cluster_address(config)
    if cluster is not None:
        _require_answer(cluster)
    # Ray's own warnings here are about its settings (that tokens are on, say), not about the run.
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if cluster is None:
            num_cpus = max(os.cpu_count() or 1, math.ceil(num_cpus_wanted))
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=config.object_store_bytes,
                **options,
            )
        else:
            ray.init(address=cluster, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SessionError(f"cannot reach Ray at {cluster or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def cluster_address(config: ClusterConfig) -> str | None:
    """The address of the cluster to join; None where Ray is to be started on this machine.

    ``auto`` follows RAY_ADDRESS, which Ray sets in a submitted job. It does not follow the file that Ray leaves
    about the last cluster on this machine: that cluster may be gone.
    """
    if config.address == "local":
        return None
    if config.address == "auto":
        return os.environ.get("RAY_ADDRESS") or None
    return config.address


def _require_answer(address: str) -> None:
    """Refuse at once what Ray would try for minutes: a server of another kind, or an address where nobody listens."""
    if "://" in address:
        raise SessionError(
            f"{address} (from RAY_ADDRESS or cluster.address) is not a cluster's own address, which is host:port; "
            "from outside the cluster, send the run to it with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise SessionError(
            f"no Ray cluster at {address} (from RAY_ADDRESS or cluster.address): {error}; start one with "
            "`ray start --head`, or set cluster.address=local"
        ) from error
