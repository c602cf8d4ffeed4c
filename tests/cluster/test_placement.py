"""Where roles are put, on real raylets; and what is said when they are not."""

from __future__ import annotations

import asyncio
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.config import ClusterConfig, PlacementConfig
from cluster.errors import PlacementFailed
from cluster.nodes import Node
from cluster.placement import Placement, diagnose, place, plan_bundles

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets and log files of Ray's daemons


def role(**values: object) -> PlacementConfig:
    return PlacementConfig.model_validate({"cpus_per_rank": 0.5, **values})


async def laid_out(wanted: dict[str, PlacementConfig], config: ClusterConfig) -> tuple[Placement, dict[str, list[str]]]:
    """The placement, and the node of every rank by role."""
    placement = await place(plan_bundles(wanted, config.accelerator_resource), config)
    where: dict[str, list[str]] = {}
    for name, one in wanted.items():
        for rank in range(one.num_ranks):
            group, bundle = placement.of_rank(name, rank)
            where.setdefault(name, []).append(placement_group_table(group)["bundles_to_node_id"][bundle])
    return placement, where


async def free_again(raylets: Cluster) -> None:
    """Wait until nothing is reserved any more."""
    for _ in range(100):
        if ray.available_resources().get("gpu_slot") == ray.cluster_resources()["gpu_slot"]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"still reserved: {ray.available_resources()}")


@pytest.mark.parametrize(
    ("strategy", "num_nodes_used"), [("PACK", 1), ("STRICT_PACK", 1), ("SPREAD", 2), ("STRICT_SPREAD", 2)]
)
async def test_strategies(raylets: Cluster, config: ClusterConfig, strategy: str, num_nodes_used: int) -> None:
    wanted = {"policy": role(num_nodes=2, ranks_per_node=2, gpus_per_rank=1, strategy=strategy)}
    placement, where = await laid_out(wanted, config)
    try:
        nodes = where["policy"]
        assert len(set(nodes)) == num_nodes_used
        assert nodes[0] == nodes[1] and nodes[2] == nodes[3], "the ranks of one node slot stand on one node"
    finally:
        placement.release()
    await free_again(raylets)


async def test_each_role_has_its_own_group(raylets: Cluster, config: ClusterConfig) -> None:
    wanted = {name: role(ranks_per_node=4, gpus_per_rank=1) for name in ("policy", "critic")}
    placement, where = await laid_out(wanted, config)
    try:
        assert placement.of_rank("policy", 0)[0].id != placement.of_rank("critic", 0)[0].id
        assert set(where["policy"]).isdisjoint(where["critic"]), "four accelerators each: a node each"
        assert ray.available_resources().get("gpu_slot", 0) == 0
    finally:
        placement.release()
    await free_again(raylets)


async def test_colocated_roles_share_bundles_rank_by_rank(raylets: Cluster, config: ClusterConfig) -> None:
    half = role(num_nodes=2, ranks_per_node=2, gpus_per_rank=0.5, colocate="shared", strategy="STRICT_SPREAD")
    placement, where = await laid_out({"policy": half, "rollout": half}, config)
    try:
        assert where["policy"] == where["rollout"]
        assert where["policy"][0] == where["policy"][1] != where["policy"][2] == where["policy"][3]
        assert placement.of_rank("policy", 0)[0].id == placement.of_rank("rollout", 0)[0].id
        assert ray.available_resources()["gpu_slot"] == 4, "four ranks of two roles on four accelerators"
    finally:
        placement.release()
    await free_again(raylets)


async def test_refused_with_the_reason(raylets: Cluster, config: ClusterConfig) -> None:
    wanted = {"policy": role(ranks_per_node=5, gpus_per_rank=1), "reward": role(gpus_per_rank=1)}
    started = time.monotonic()
    with pytest.raises(PlacementFailed) as failed:
        await laid_out(wanted, config.model_copy(update={"placement_timeout_s": 1}))
    assert time.monotonic() - started < 4
    message = str(failed.value)
    assert "no place for policy within 1 s" in message
    assert "policy bundle 0 of 1 needs" in message and "5 gpu_slot" in message
    assert message.count("of 4 gpu_slot left") == 2 and "reward bundle" not in message
    await free_again(raylets)


async def test_strict_spread_over_too_few_nodes(raylets: Cluster, config: ClusterConfig) -> None:
    wanted = {"rollout": role(num_nodes=3, gpus_per_rank=1, strategy="STRICT_SPREAD")}
    with pytest.raises(PlacementFailed, match="ruled out by STRICT_SPREAD"):
        await laid_out(wanted, config.model_copy(update={"placement_timeout_s": 1}))
    await free_again(raylets)


async def test_placed_when_a_node_joins(raylets: Cluster, config: ClusterConfig) -> None:
    wanted = {"rollout": role(num_nodes=3, gpus_per_rank=1, strategy="STRICT_SPREAD")}
    waiting = asyncio.create_task(laid_out(wanted, config))
    await asyncio.sleep(1)
    assert not waiting.done()
    # Blocks the loop for a second: Ray adds nodes in the main thread only.
    node = raylets.add_node(num_cpus=1, resources={"gpu_slot": 1}, object_store_memory=80 << 20)
    try:
        placement, where = await waiting
        placement.release()
        assert len(set(where["rollout"])) == 3
    finally:
        waiting.cancel()
        raylets.remove_node(node)
    await free_again(raylets)


async def test_a_cancelled_wait_keeps_nothing(raylets: Cluster, config: ClusterConfig) -> None:
    wanted = {"policy": role(gpus_per_rank=1), "rollout": role(ranks_per_node=5, gpus_per_rank=1)}
    waiting = asyncio.create_task(laid_out(wanted, config))
    await asyncio.sleep(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await free_again(raylets)


async def test_ranks_of_a_colocation_group_share_gpus_in_pairs(raylets: Cluster, config: ClusterConfig) -> None:
    node = raylets.add_node(num_cpus=4, num_gpus=4, object_store_memory=80 << 20)
    half = role(ranks_per_node=2, gpus_per_rank=0.5, colocate="shared")
    wanted = {"policy": half, "rollout": half, "reward": role(ranks_per_node=2, gpus_per_rank=0.5)}
    try:
        placement, _ = await laid_out(wanted, config.model_copy(update={"accelerator_resource": "GPU"}))
        devices = {name: [placement.devices_of(name, rank) for rank in range(2)] for name in wanted}
        placement.release()
    finally:
        raylets.remove_node(node)
    assert devices["policy"] == devices["rollout"]
    assert len(set(devices["policy"])) == 2, "two ranks of one role on two GPUs"
    assert len(set(devices["reward"])) == 1 and not set(devices["reward"]) & set(devices["policy"])


def test_diagnose_names_bundle_node_and_lack() -> None:
    plan = plan_bundles({"policy": role(num_nodes=2, ranks_per_node=2, gpus_per_rank=1)}, "GPU")
    nodes = [
        Node("10.0.0.3", {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 1}),
        Node("10.0.0.4", {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}),
    ]
    assert diagnose(plan, nodes, use_free=False) == []
    (reason,) = diagnose(plan, nodes, use_free=True)
    assert reason == (
        "policy bundle 1 of 2 needs 1 CPU, 2 GPU: node 10.0.0.3 has 1 of 4 GPU left; node 10.0.0.4 has 0 of 4 GPU left"
    )


def test_colocated_roles_of_other_shape_are_refused() -> None:
    wanted = {"policy": role(ranks_per_node=2, colocate="a"), "critic": role(ranks_per_node=1, colocate="a")}
    with pytest.raises(PlacementFailed, match="critic has"):
        plan_bundles(wanted, "GPU")


def test_a_role_may_not_share_its_name_with_a_group() -> None:
    wanted = {"policy": role(), "critic": role(colocate="policy"), "reward": role(colocate="policy")}
    with pytest.raises(PlacementFailed, match="policy"):
        plan_bundles(wanted, "GPU")


def test_diagnose_a_strategy_and_an_empty_cluster() -> None:
    spread = plan_bundles({"rollout": role(num_nodes=2, gpus_per_rank=1, strategy="STRICT_SPREAD")}, "GPU")
    (reason,) = diagnose(spread, [Node("a", {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4})], use_free=True)
    assert reason.endswith("node a is ruled out by STRICT_SPREAD")
    assert diagnose(spread, [], use_free=True)[0].endswith("the cluster has no node")


def nodes_of(**accelerators: float) -> list[Node]:
    return [Node(name, {"CPU": 32, "GPU": gpus}, {"CPU": 32, "GPU": gpus}) for name, gpus in accelerators.items()]


def test_a_small_role_does_not_take_the_large_one_s_node() -> None:
    wanted = {"critic": role(ranks_per_node=4, gpus_per_rank=1), "policy": role(ranks_per_node=8, gpus_per_rank=1)}
    assert diagnose(plan_bundles(wanted, "GPU"), nodes_of(large=8, small=4), use_free=True) == []
    assert len(diagnose(plan_bundles(wanted, "GPU"), nodes_of(large=8, small=3), use_free=True)) == 1


def test_what_must_stand_on_one_node_is_looked_at_as_one() -> None:
    plan = plan_bundles({"policy": role(num_nodes=2, ranks_per_node=4, gpus_per_rank=1, strategy="STRICT_PACK")}, "GPU")
    assert diagnose(plan, nodes_of(small=4, large=8), use_free=True) == []
    (reason,) = diagnose(plan, nodes_of(one=4, two=4), use_free=True)
    assert reason.startswith("policy (its 2 bundles on one node) needs 4 CPU, 8 GPU: node one has 4 of 4 GPU left")
