"""Where ranks sit: planned without Ray, and placed for real on several nodes."""

from __future__ import annotations

import asyncio
import time

import pytest
from conftest import ENVIRONMENT, STORE_BYTES
from echo_role import Echo
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig, PlacementConfig
from cluster.errors import PlacementFailed
from cluster.group import RoleGroup, RoleSpec
from cluster.nodes import Node, nodes
from cluster.placement import diagnose, place, plan_bundles

CONFIG = ClusterConfig(accelerator_resource="gpu_slot", placement_timeout_s=20, call_timeout_s=30)
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",  # Ray leaves pipes of the processes it started to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::FutureWarning:ray",
)


def slots(nodes: int, ranks: int, strategy: str = "PACK", **more: object) -> PlacementConfig:
    return PlacementConfig.model_validate(
        {"num_nodes": nodes, "ranks_per_node": ranks, "gpus_per_rank": 1, "strategy": strategy, **more}
    )


def node(name: str, slots: float, free: float | None = None) -> Node:
    total = {"CPU": 4.0, "gpu_slot": slots}
    return Node(name, total, total if free is None else {**total, "gpu_slot": free})


def test_a_role_gets_a_bundle_a_node() -> None:
    (plan,) = plan_bundles({"policy": slots(2, 2)}, "gpu_slot")
    assert plan.bundles == ({"CPU": 2.0, "gpu_slot": 2.0},) * 2
    assert plan.bundle_of_rank == {"policy": (0, 0, 1, 1)}


def test_colocated_roles_share_bundles_rank_by_rank() -> None:
    halves = {role: slots(1, 2, gpus_per_rank=0.5, colocate="scorers") for role in ("reference", "reward")}
    plans = plan_bundles({**halves, "policy": slots(1, 1)}, "gpu_slot")
    assert [plan.name for plan in plans] == ["scorers", "policy"]
    assert plans[0].bundles == ({"CPU": 2.0, "gpu_slot": 1.0},) * 2
    assert plans[0].bundle_of_rank == {"reference": (0, 1), "reward": (0, 1)}


def test_colocated_roles_need_the_same_ranks() -> None:
    with pytest.raises(PlacementFailed, match="colocation group g: b has 3 ranks with PACK, a 2"):
        plan_bundles({"a": slots(1, 2, colocate="g"), "b": slots(1, 3, colocate="g")}, "gpu_slot")


def test_diagnosis_names_bundle_and_nodes() -> None:
    plans = plan_bundles({"policy": slots(2, 2)}, "gpu_slot")
    assert diagnose(plans, [node("a", 2), node("b", 2)], use_free=True) == []
    assert diagnose(plans, [node("a", 2), node("b", 2, free=1)], use_free=True) == [
        "policy bundle 1 of 2 needs 2 CPU, 2 gpu_slot: node a has 0 of 2 gpu_slot left; node b has 1 of 2 gpu_slot left"
    ]
    spread = plan_bundles({"policy": slots(2, 1, "STRICT_SPREAD")}, "gpu_slot")
    (problem,) = diagnose(spread, [node("a", 4)], use_free=True)
    assert problem.endswith("node a is ruled out by STRICT_SPREAD")
    assert diagnose(plans, [], use_free=True)[0].endswith("the cluster has no node")


async def all_free() -> None:
    """Wait until what an earlier test had placed is given back: Ray does that a moment later."""
    deadline = time.monotonic() + 20
    while any(node.free.get("gpu_slot") != node.total.get("gpu_slot") for node in nodes()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def nodes_of(placements: dict[str, PlacementConfig], role: str) -> list[str]:
    """On which nodes the ranks of a role really sit."""
    await all_free()
    placement = await place(plan_bundles(placements, "gpu_slot"), CONFIG)
    try:
        spec = RoleSpec(role, placements[role], 0, environment=ENVIRONMENT)
        group = await RoleGroup.start(Echo, spec, placement, CONFIG, (0,))
        answers = await group.call(Echo.where)
        assert all(any(name.startswith("gpu_slot") for name in assigned) for _, assigned in answers)
        return [where for where, _ in answers]
    finally:
        placement.release()


@pytest.mark.parametrize(
    ("placement", "num_nodes"),
    [
        (slots(1, 2), 1),
        (slots(2, 1, "STRICT_PACK"), 1),
        (slots(2, 2), 2),
        (slots(3, 1, "SPREAD"), 3),
        (slots(2, 1, "STRICT_SPREAD"), 2),
    ],
    ids=["one node", "strictly one", "a bundle a node", "spread", "strictly spread"],
)
async def test_ranks_sit_as_configured(ray_cluster: Cluster, placement: PlacementConfig, num_nodes: int) -> None:
    where = await nodes_of({"policy": placement}, "policy")
    assert len(set(where)) == num_nodes
    for first in range(0, len(where), placement.ranks_per_node):
        assert len(set(where[first : first + placement.ranks_per_node])) == 1


async def test_colocated_ranks_sit_side_by_side(ray_cluster: Cluster) -> None:
    roles = {
        role: slots(1, 3, gpus_per_rank=0.5, colocate="scorers", strategy="SPREAD") for role in ("reference", "reward")
    }
    await all_free()
    placement = await place(plan_bundles(roles, "gpu_slot"), CONFIG)
    try:
        specs = [RoleSpec(role, roles[role], 0, environment=ENVIRONMENT) for role in roles]
        groups = [await RoleGroup.start(Echo, spec, placement, CONFIG, (0,)) for spec in specs]
        seats = [await group.call(Echo.where) for group in groups]
    finally:
        placement.release()
    assert [node for node, _ in seats[0]] == [node for node, _ in seats[1]]
    assert len({node for node, _ in seats[0]}) == 3


async def test_what_does_not_fit_is_refused_with_the_reason(ray_cluster: Cluster) -> None:
    config = CONFIG.model_copy(update={"placement_timeout_s": 2.0})
    began = time.monotonic()
    with pytest.raises(PlacementFailed, match="no place for policy within 2 s") as refused:
        await place(plan_bundles({"reward": slots(1, 1), "policy": slots(1, 3)}, "gpu_slot"), config)
    assert time.monotonic() - began < 10
    assert "policy bundle 0 of 1 needs 3 CPU, 3 gpu_slot" in str(refused.value)
    assert str(refused.value).count("of 2 gpu_slot left") == 3
    # What was placed is given back: the whole cluster is free again.
    assert len(set(await nodes_of({"policy": slots(3, 2)}, "policy"))) == 3


async def test_placed_when_a_node_joins_in_time(ray_cluster: Cluster) -> None:
    waiting = asyncio.ensure_future(place(plan_bundles({"policy": slots(1, 4)}, "gpu_slot"), CONFIG))
    await asyncio.sleep(1)
    assert not waiting.done()
    joined = ray_cluster.add_node(num_cpus=4, resources={"gpu_slot": 4}, object_store_memory=STORE_BYTES)
    placement = await waiting
    placement.release()
    ray_cluster.remove_node(joined)
