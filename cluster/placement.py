"""Where the ranks of each role sit: bundles planned from the configuration, and Ray placement groups for them.

Invariants:

- A role on its own gets one bundle a node: its ``ranks_per_node`` ranks stand on one node together, and
  ``strategy`` says how the nodes' bundles are laid out.
- Roles that share a colocation group get one bundle a rank, which holds that rank of each of them; so rank i of one
  shares its accelerator with rank i of the other.
- Every wait has a deadline, and ends by saying which bundle fits no node.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.config import ClusterConfig, PlacementConfig, Strategy
from cluster.errors import PlacementFailed
from cluster.nodes import Node, Resources, nodes


@dataclass(frozen=True)
class GroupPlan:
    """One placement group: its name, its bundles, and the roles whose ranks it holds.

    ``bundle_of_rank[role][rank]`` is the bundle that a rank sits in.
    """

    name: str
    strategy: Strategy
    bundles: tuple[Resources, ...]
    bundle_of_rank: dict[str, tuple[int, ...]]


def rank_resources(placement: PlacementConfig, accelerator: str) -> Resources:
    """What one rank takes."""
    resources = {"CPU": placement.cpus_per_rank}
    if placement.gpus_per_rank:
        resources[accelerator] = placement.gpus_per_rank
    return resources


def plan_bundles(placements: Mapping[str, PlacementConfig], accelerator: str) -> list[GroupPlan]:
    """The placement groups of a run, by role.

    Raises:
        PlacementFailed: roles of one colocation group differ in ranks or strategy.
    """
    groups: dict[str, dict[str, PlacementConfig]] = {}
    for role, placement in placements.items():
        groups.setdefault(placement.colocate or role, {})[role] = placement
    return [_plan(name, roles, accelerator) for name, roles in groups.items()]


def _plan(name: str, roles: Mapping[str, PlacementConfig], accelerator: str) -> GroupPlan:
    first = next(iter(roles.values()))
    if len(roles) == 1:
        role, per_node = next(iter(roles)), first.ranks_per_node
        bundle = {key: amount * per_node for key, amount in rank_resources(first, accelerator).items()}
        of_rank = tuple(rank // per_node for rank in range(first.num_ranks))
        return GroupPlan(name, first.strategy, (bundle,) * first.num_nodes, {role: of_rank})
    for role, placement in roles.items():
        if (placement.num_ranks, placement.strategy) != (first.num_ranks, first.strategy):
            other = next(iter(roles))
            raise PlacementFailed(
                f"colocation group {name}: {role} has {placement.num_ranks} ranks with {placement.strategy}, {other} "
                f"{first.num_ranks} with {first.strategy}; colocated roles need the same"
            )
    bundle = {}
    for placement in roles.values():
        for key, amount in rank_resources(placement, accelerator).items():
            bundle[key] = bundle.get(key, 0.0) + amount
    ranks = tuple(range(first.num_ranks))
    return GroupPlan(name, first.strategy, (bundle,) * first.num_ranks, dict.fromkeys(roles, ranks))


def diagnose(plans: Sequence[GroupPlan], on: Sequence[Node], *, use_free: bool) -> list[str]:
    """Why plans do not fit: a line for each bundle that finds no node, with what each node lacks. Empty if all fit.

    Bundles are laid into nodes first-fit, largest first: an estimate of what Ray will do, good enough to explain.

    Args:
        use_free: fit into what is free now; else into what nodes have in all.
    """
    room = {node.name: dict(node.free if use_free else node.total) for node in on}
    problems: list[str] = []
    for plan in plans:
        taken: set[str] = set()
        for index, bundle in enumerate(plan.bundles):
            allowed = [address for address in room if _may_use(plan.strategy, address, taken)]
            place = next((address for address in allowed if _fits(bundle, room[address])), None)
            if place is None:
                problems.append(_explain(plan, index, bundle, on, room, allowed))
                continue
            taken.add(place)
            for key, amount in bundle.items():
                room[place][key] = room[place].get(key, 0.0) - amount
    return problems


def _may_use(strategy: Strategy, address: str, taken: set[str]) -> bool:
    if strategy == "STRICT_SPREAD":
        return address not in taken
    return strategy != "STRICT_PACK" or not taken or address in taken


def _fits(bundle: Resources, room: Resources) -> bool:
    return all(room.get(key, 0.0) >= amount - 1e-6 for key, amount in bundle.items())


def _explain(
    plan: GroupPlan,
    index: int,
    bundle: Resources,
    on: Sequence[Node],
    room: Mapping[str, Resources],
    allowed: Sequence[str],
) -> str:
    needs = ", ".join(f"{amount:g} {key}" for key, amount in bundle.items())
    lacks = []
    for node in on:
        if node.name not in allowed:
            lacks.append(f"node {node.name} is ruled out by {plan.strategy}")
            continue
        short = [
            f"{max(room[node.name].get(key, 0.0), 0.0):g} of {node.total.get(key, 0.0):g} {key} left"
            for key, amount in bundle.items()
            if room[node.name].get(key, 0.0) < amount - 1e-6
        ]
        lacks.append(f"node {node.name} has {' and '.join(short)}")
    where = "; ".join(lacks) or "the cluster has no node"
    return f"{plan.name} bundle {index} of {len(plan.bundles)} needs {needs}: {where}"


class Placement:
    """The placement groups of a run, ready to start ranks in."""

    def __init__(self, groups: Mapping[str, PlacementGroup], plans: Mapping[str, GroupPlan]) -> None:
        self._groups = groups
        self._plan_of_role = {role: plan for plan in plans.values() for role in plan.bundle_of_rank}

    def of_rank(self, role: str, rank: int) -> tuple[PlacementGroup, int]:
        """The placement group and the bundle that a rank belongs in."""
        plan = self._plan_of_role[role]
        return self._groups[plan.name], plan.bundle_of_rank[role][rank]

    def release(self) -> None:
        """Give every place back; what still runs there is ended."""
        for group in self._groups.values():
            remove_placement_group(group)


async def place(plans: Sequence[GroupPlan], config: ClusterConfig) -> Placement:
    """Create the placement groups and wait until all have their place.

    Raises:
        PlacementFailed: not all had it within ``config.placement_timeout_s``.
    """
    groups = {plan.name: placement_group(list(plan.bundles), plan.strategy, name=plan.name) for plan in plans}
    ready = {name: asyncio.ensure_future(group.ready()) for name, group in groups.items()}
    _, waiting = await asyncio.wait(ready.values(), timeout=config.placement_timeout_s)
    if not waiting:
        return Placement(groups, {plan.name: plan for plan in plans})
    unplaced = [plan for plan in plans if ready[plan.name] in waiting]
    reasons = diagnose(unplaced, nodes(), use_free=True)
    for group in groups.values():
        remove_placement_group(group)
    for wait in waiting:
        wait.cancel()
    names = ", ".join(plan.name for plan in unplaced)
    detail = "\n".join(f"  {reason}" for reason in reasons) or "  each bundle fits by itself, but not all at once"
    raise PlacementFailed(f"no place for {names} within {math.ceil(config.placement_timeout_s)} s:\n{detail}")
