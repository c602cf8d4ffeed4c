"""``troupe check``: everything about a run that can be known before an accelerator is taken.

The configuration's own rules have been checked by the time this is called. Here are those that need the models
(``launch.check_models``), the data (``launch.check_data``) and the cluster. All problems are reported, not the first.

Invariant: importing this module loads neither torch nor Ray. They are loaded where a model is looked at (Transformers
loads torch for it) and where places are.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig, PlacementConfig
from cluster.errors import ClusterError
from data.tokenizer import Tokenizer
from launch.check_data import check_data
from launch.check_environment import check_environment
from launch.check_rewards import check_rewards
from launch.check_tuning import check_tuning
from launch.config import RunConfig
from launch.errors import Problem, RunDirError
from launch.rundir import RunDir

if TYPE_CHECKING:
    from cluster.nodes import Node
    from launch.check_models import Facts, WantedModel

#: It is compiled against the torch that is there, so it cannot come with it.
FLASH_ATTENTION = "pip install flash-attn --no-build-isolation"


@dataclass
class CheckReport:
    """What was found. Rich renders it; ``ok`` is whether the run can start."""

    facts: Facts = field(default_factory=list)
    places: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is in the way."""
        return not self.problems

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table.grid(padding=(0, 2))
        for what, fact in self.facts:
            facts.add_row(what, Text(fact))  # not markup: paths and messages hold brackets
        yield facts
        places = Table("role", "nodes x ranks", "accelerators a rank", "CPUs a rank", "placement group", "layout")
        for place in self.places:
            places.add_row(*(Text(word) for word in place))
        yield places
        for problem in self.problems:
            yield Text.assemble(("problem", "bold red"), f" {problem}")
        yield "[bold green]can run[/]" if self.ok else f"[bold red]cannot run[/]: {len(self.problems)} problem(s)"


def check(config: RunConfig) -> CheckReport:
    """Look at everything that a run would need."""
    report = CheckReport()
    report.problems += _check_folder(config, report)
    from launch.check_models import check_model, wanted_models

    tokenizers: dict[str, Tokenizer] = {}
    models = list(wanted_models(config))
    for wanted in models:
        report.problems += check_model(wanted, report.facts, tokenizers)
    report.problems += _check_attention(models, config.cluster, report)
    report.problems += check_tuning(config, report.facts)
    report.problems += check_rewards(config, tokenizers, report.facts)
    report.problems += check_environment(config, report.facts)
    report.problems += check_data(config, tokenizers.get(models[0].where), report.facts)
    for placements in filter(None, (config.placements_before(), config.placements())):
        report.problems += _check_places(placements, config.cluster, config.cpus_wanted(), report)
    return report


def _check_folder(config: RunConfig, report: CheckReport) -> Iterator[Problem]:
    try:
        run_dir = RunDir.of(config)
    except RunDirError as error:
        yield Problem("run.root", str(error))
        return
    state = ", begun already: --resume goes on with it" if run_dir.begun else ""
    report.facts.append(("run", f"{run_dir.path}{state}"))


def _check_attention(
    models: Iterable[WantedModel], cluster: ClusterConfig, report: CheckReport
) -> Iterator[Problem]:
    """Whether ``flash_attention_2`` finds its package.

    A problem where the roles run on this machine. On a cluster they run on its nodes, of whose packages this machine
    knows nothing, so there it is a fact to look at.
    """
    from cluster.session import cluster_address

    if importlib.util.find_spec("flash_attn") is not None:
        return
    for wanted in models:
        if wanted.model.attention != "flash_attention_2":
            continue
        where, right = f"{wanted.where}.attention", f"`{FLASH_ATTENTION}`, or attention: sdpa"
        if cluster_address(cluster) is None:
            yield Problem(where, "flash_attention_2 needs the package flash-attn, which is not installed here", right)
        else:
            report.facts.append(
                (where, f"needs the package flash-attn, not installed here; the role's nodes need it: {right}")
            )


def _check_places(
    placements: Mapping[str, PlacementConfig], cluster: ClusterConfig, cpus: float, report: CheckReport
) -> Iterator[Problem]:
    from cluster.placement import diagnose, plan_bundles

    try:
        plans = plan_bundles(placements, cluster.accelerator_resource)
    except ClusterError as error:
        yield Problem("cluster", str(error))
        return
    group_of = {role: plan for plan in plans for role in plan.bundle_of_rank}
    for role, placement in placements.items():
        accelerators = f"{placement.gpus_per_rank:g} {cluster.accelerator_resource}" if placement.gpus_per_rank else "-"
        plan = group_of[role]
        place = (
            role,
            f"{placement.num_nodes} x {placement.ranks_per_node}",
            accelerators,
            f"{placement.cpus_per_rank:g}",
            f"{plan.name} ({len(plan.bundles)} bundle{'s' if len(plan.bundles) > 1 else ''})",
            plan.strategy,
        )
        if place not in report.places:
            report.places.append(place)
    accelerated = any(placement.gpus_per_rank for placement in placements.values())
    try:
        there = _nodes(cluster, cpus, accelerated)
    except ClusterError as error:
        yield Problem("cluster.address", str(error))
        return
    for node in there:
        fact = ("node", f"{node.name}: {_free(node, cluster)}")
        if fact not in report.facts:
            report.facts.append(fact)
    for use_free, when in ((False, "the whole cluster"), (True, "what is free now")):
        if reasons := diagnose(plans, there, use_free=use_free):
            yield from (Problem("cluster", f"{reason} (in {when})") for reason in reasons)
            break


def _nodes(cluster: ClusterConfig, cpus: float, accelerated: bool) -> list[Node]:
    """The nodes that the run would have.

    Raises:
        ClusterError: the cluster cannot be joined, or Ray does not start here.
    """
    from cluster.nodes import Node, nodes
    from cluster.session import cluster_address, connect

    if cluster_address(cluster) is None and not accelerated:
        # What `connect` would start here, without starting it.
        cores = {"CPU": float(max(os.cpu_count() or 1, math.ceil(cpus)))}
        return [Node("this machine", dict(cores), dict(cores))]
    with connect(cluster, num_cpus_wanted=cpus):
        return nodes()


def _free(node: Node, cluster: ClusterConfig) -> str:
    """``3 of 8 CPU, 1 of 4 GPU free``."""
    names = [name for name in ("CPU", cluster.accelerator_resource) if name in node.total]
    return ", ".join(f"{node.free.get(name, 0.0):g} of {node.total[name]:g} {name}" for name in names) + " free"
