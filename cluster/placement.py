"""Where the ranks of each role sit: bundles planned from the configuration, and Ray placement groups for them.

Invariants:

- A role, or the roles of a colocation group, get one bundle a node: their ``ranks_per_node`` ranks stand on one node
  together, and ``strategy`` says how the nodes' bundles are laid out.
- In a colocation group rank i of one role shares its GPU with rank i of the other. Ray by itself would fill a GPU
  with two ranks of the same role, so the GPUs of a shared bundle are read and each rank is told its own.
- Every wait has a deadline, and ends by saying which bundle fits no node. What was not placed stays reserved nowhere.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig, PlacementConfig, Strategy
from cluster.errors import PlacementFailed
from cluster.nodes import Node, Resources, nodes
from cluster.session import cluster_address

logger = logging.getLogger(__name__)
#: How often, while roles wait for a place, it is said why.
REPORT_S = 10.0


@dataclass(frozen=True)
class GroupPlan:
    """One placement group: its name, its bundles, and the roles whose ranks it holds.

    ``bundle_of_rank[role][rank]`` is the bundle that a rank sits in.
    """

    name: str
    strategy: Strategy
    bundles: tuple[Resources, ...]
    bundle_of_rank: dict[str, tuple[int, ...]]
    shares_accelerators: bool = False


def rank_resources(placement: PlacementConfig, accelerator: str) -> Resources:
    """What one rank takes."""
    resources = {"CPU": placement.cpus_per_rank}
    if placement.gpus_per_rank:
        resources[accelerator] = placement.gpus_per_rank
    return resources


def plan_bundles(placements: Mapping[str, PlacementConfig], accelerator: str) -> list[GroupPlan]:
    """The placement groups of a run, by role.

    Raises:
        PlacementFailed: roles of one colocation group differ in layout, or their shares exceed one accelerator a rank.
    """
    groups: dict[str, dict[str, PlacementConfig]] = {}
    for role, placement in placements.items():
        if placement.colocate in placements:
            raise PlacementFailed(f"{role}: colocation group {placement.colocate} has a role's name; choose another")
        groups.setdefault(placement.colocate or role, {})[role] = placement
    return [_plan(name, roles, accelerator) for name, roles in groups.items()]


def _plan(name: str, roles: Mapping[str, PlacementConfig], accelerator: str) -> GroupPlan:
    other, first = next(iter(roles.items()))
    for role, placement in roles.items():
        if _shape(placement) != _shape(first):
            raise PlacementFailed(
                f"colocation group {name}: {role} has {' '.join(_shape(placement))}, "
                f"{other} {' '.join(_shape(first))}; colocated roles need the same"
            )
    per_node = first.ranks_per_node
    bundle = {"CPU": round(per_node * sum(placement.cpus_per_rank for placement in roles.values()), 4)}
    accelerators = _accelerators(name, roles)
    if accelerators:
        bundle[accelerator] = accelerators
    of_rank = tuple(rank // per_node for rank in range(first.num_ranks))
    shares = any(placement.gpus_per_rank % 1 for placement in roles.values())
    return GroupPlan(name, first.strategy, (bundle,) * first.num_nodes, dict.fromkeys(roles, of_rank), shares)


def _shape(placement: PlacementConfig) -> tuple[str, str, str]:
    return f"{placement.num_nodes} nodes", f"of {placement.ranks_per_node} ranks,", placement.strategy


def _accelerators(name: str, roles: Mapping[str, PlacementConfig]) -> float:
    """Accelerators of a bundle: so many that no rank's share lies across two of them."""
    shares = [placement.gpus_per_rank for placement in roles.values() if placement.gpus_per_rank]
    num_ranks, share = next(iter(roles.values())).ranks_per_node, sum(shares)
    if all(part % 1 == 0 for part in shares):
        return num_ranks * share
    if share > 1 + 1e-6:
        raise PlacementFailed(f"{name}: gpus_per_rank adds up to {share:g}; whole numbers, or fractions of at most 1")
    if len(shares) > 1:
        return float(num_ranks)
    ranks_per_accelerator = int(1 / share + 1e-6)
    if num_ranks <= ranks_per_accelerator:
        return round(num_ranks * share, 4)
    return float(math.ceil(num_ranks / ranks_per_accelerator))


def diagnose(plans: Sequence[GroupPlan], on: Sequence[Node], *, use_free: bool) -> list[str]:
    """Why plans do not fit: a line for each bundle that finds no node, with what each node lacks. Empty if all fit.

    Bundles are laid into nodes largest first, each into the node that it fills best: an estimate of what Ray will do,
    good enough to explain. What must stand on one node is laid as one.

    Args:
        use_free: fit into what is free now; else into what nodes have in all.
    """
    room = {node.name: dict(node.free if use_free else node.total) for node in on}
    taken: dict[str, set[str]] = {plan.name: set() for plan in plans}
    problems: list[str] = []
    for plan, index, bundle in sorted(_to_lay(plans), key=lambda item: _size(item[2]), reverse=True):
        allowed = [name for name in room if plan.strategy != "STRICT_SPREAD" or name not in taken[plan.name]]
        fitting = [name for name in allowed if _fits(bundle, room[name])]
        if not fitting:
            problems.append(_explain(plan, index, bundle, on, room, allowed))
            continue
        place = min(fitting, key=lambda name: _size({key: room[name].get(key, 0.0) for key in bundle}))
        taken[plan.name].add(place)
        for key, amount in bundle.items():
            room[place][key] = room[place].get(key, 0.0) - amount
    return problems


def _to_lay(plans: Sequence[GroupPlan]) -> Iterator[tuple[GroupPlan, int | None, Resources]]:
    """Each bundle with its number, or none for the sum of all of a plan's."""
    for plan in plans:
        if plan.strategy == "STRICT_PACK":
            yield plan, None, {key: sum(bundle[key] for bundle in plan.bundles) for key in plan.bundles[0]}
        else:
            yield from ((plan, index, bundle) for index, bundle in enumerate(plan.bundles))


def _size(resources: Resources) -> tuple[float, float]:
    """Accelerators first, then CPUs."""
    return sum(amount for key, amount in resources.items() if key != "CPU"), resources.get("CPU", 0.0)


def _fits(bundle: Resources, room: Resources) -> bool:
    return all(room.get(key, 0.0) >= amount - 1e-6 for key, amount in bundle.items())


def _explain(
    plan: GroupPlan,
    index: int | None,
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
    what = f"bundle {index} of {len(plan.bundles)}"
    if index is None:
        what = "bundle 0 of 1" if len(plan.bundles) == 1 else f"(its {len(plan.bundles)} bundles on one node)"
    return f"{plan.name} {what} needs {needs}: {where}"


class Placement:
    """The placement groups of a run, ready to start ranks in."""

    def __init__(self, groups: Mapping[str, PlacementGroup], plans: Sequence[GroupPlan]) -> None:
        self._groups = groups
        self._plan_of_role = {role: plan for plan in plans for role in plan.bundle_of_rank}
        self._gpus: dict[tuple[str, int], tuple[str, ...]] = {}

    def of_rank(self, role: str, rank: int) -> tuple[PlacementGroup, int]:
        """The placement group and the bundle that a rank belongs in."""
        plan = self._plan_of_role[role]
        return self._groups[plan.name], plan.bundle_of_rank[role][rank]

    def devices_of(self, role: str, rank: int) -> tuple[str, ...] | None:
        """The GPU that a rank shares with others; None where its GPUs are its own, as Ray gives them."""
        plan = self._plan_of_role[role]
        of_rank = plan.bundle_of_rank[role]
        gpus = self._gpus.get((plan.name, of_rank[rank]))
        if gpus is None:
            return None
        per_bundle = of_rank.count(of_rank[rank])
        return (gpus[rank % per_bundle * len(gpus) // per_bundle],)

    async def read_gpus(self, timeout_s: float) -> None:
        """Ask each shared bundle which GPUs it holds.

        Raises:
            PlacementFailed: no answer within ``timeout_s``.
        """
        look = ray.remote(_visible_gpus)
        asked = {
            (plan.name, index): look.options(
                num_cpus=0,
                num_gpus=bundle["GPU"],
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._groups[plan.name], placement_group_bundle_index=index
                ),
            ).remote()
            for plan in {id(plan): plan for plan in self._plan_of_role.values()}.values()
            if plan.shares_accelerators
            for index, bundle in enumerate(plan.bundles)
            if "GPU" in bundle
        }
        try:
            async with asyncio.timeout(timeout_s):
                for key, gpus in asked.items():
                    self._gpus[key] = await gpus
        except TimeoutError as error:
            raise PlacementFailed(f"no answer within {timeout_s:g} s which GPUs the shared bundles hold") from error

    def release(self) -> None:
        """Give every place back; what still runs there is ended."""
        for group in self._groups.values():
            remove_placement_group(group)


async def place(plans: Sequence[GroupPlan], config: ClusterConfig) -> Placement:
    """Create the placement groups and wait until all have their place.

    A cluster may still be growing, so what does not fit it waits, saying why in the log; what does not fit a Ray that
    was started on this machine is refused at once.

    Raises:
        PlacementFailed: not all had it within ``config.placement_timeout_s``.
    """
    if cluster_address(config) is None and (reasons := diagnose(plans, nodes(), use_free=False)):
        raise PlacementFailed("the roles do not fit this machine:\n" + _lines(reasons))
    groups: dict[str, PlacementGroup] = {}
    placement = Placement(groups, plans)
    try:
        for plan in plans:
            groups[plan.name] = placement_group(list(plan.bundles), plan.strategy, name=plan.name)
        await _wait(plans, groups, config.placement_timeout_s)
        await placement.read_gpus(config.start_timeout_s)
    except BaseException:
        placement.release()
        raise
    return placement


async def _wait(plans: Sequence[GroupPlan], groups: Mapping[str, PlacementGroup], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    waiting = {asyncio.ensure_future(groups[plan.name].ready()): plan for plan in plans}
    try:
        while waiting:
            left_s = max(0.0, deadline - time.monotonic())
            done, _ = await asyncio.wait(waiting, timeout=min(left_s, REPORT_S), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
                del waiting[task]
            if done:
                continue
            reasons = diagnose(list(waiting.values()), nodes(), use_free=True)
            detail = _lines(reasons or ["each bundle fits by itself, but not all at once"])
            names = ", ".join(plan.name for plan in waiting.values())
            if time.monotonic() >= deadline:
                raise PlacementFailed(f"no place for {names} within {math.ceil(timeout_s)} s:\n{detail}")
            logger.warning("no place yet for %s:\n%s", names, detail)
    finally:
        for task in waiting:
            task.cancel()


def _lines(reasons: Sequence[str]) -> str:
    return "\n".join(f"  {reason}" for reason in reasons)


def _visible_gpus() -> tuple[str, ...]:
    return tuple(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
