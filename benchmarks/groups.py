"""Roles on Ray, as a run starts them, without the run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from actors.rollout import engine_environment
from benchmarks.measure import descendants
from cluster.config import ClusterConfig, PlacementConfig
from cluster.group import RoleGroup, RoleSpec
from cluster.placement import place, plan_bundles

LOCAL = ClusterConfig(address="local", object_store_bytes=2 << 30)
#: Ray starts its workers at a low priority; where other work runs besides, what is compared would not meet it alike.
EQUAL_PRIORITY = {"RAY_worker_niceness": "0"}


@asynccontextmanager
async def started(
    roles: Mapping[str, tuple[Callable[..., Any], PlacementConfig, Sequence[object]]],
) -> AsyncIterator[dict[str, RoleGroup[Any]]]:
    """Start each role's class with its arguments, one after the other; the role named ``rollout`` is the engines'."""
    wanted = {role: placement for role, (_, placement, _) in roles.items()}
    placement = await place(plan_bundles(wanted, LOCAL.accelerator_resource), LOCAL)
    try:
        groups = {}
        for role, (role_class, _, args) in roles.items():
            engines = role == "rollout"
            environment = engine_environment(on_gpu=False) if engines else {}
            spec = RoleSpec(role, wanted[role], 0, environment=environment, is_async=engines)
            groups[role] = await RoleGroup.start(role_class, spec, placement, LOCAL, args)
        yield groups
    finally:
        placement.release()


def processes(groups: Mapping[str, RoleGroup[Any]]) -> list[int]:
    """The processes of some roles, with those that they started."""
    ranks = [rank.pid for group in groups.values() for rank in group.ranks]
    return ranks + [child for pid in ranks for child in descendants(pid)]
