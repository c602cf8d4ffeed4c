"""The nodes of the cluster, as the scheduler sees them."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

Resources = dict[str, float]


@dataclass(frozen=True)
class Node:
    """A node: what to call it, its resources, and those that are free."""

    name: str
    total: Resources
    free: Resources


def nodes() -> list[Node]:
    """The cluster's live nodes. Several may share an address, so the name holds the node's id as well."""
    # Ray's public state API needs the dashboard, which a local session does not start.
    free = available_resources_per_node()
    return [
        Node(node_name(node["NodeManagerAddress"], node["NodeID"]), dict(node["Resources"]), dict(free[node["NodeID"]]))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] in free
    ]


def node_name(address: str, node_id: str) -> str:
    """How messages name a node: address and the beginning of its id."""
    return f"{address}/{node_id[:6]}"
