"""``troupe check``: everything about a run that can be known before an accelerator is taken.

The configuration's own rules have been checked by the time this is called. Here are those that need the models, the
data and the cluster. All problems are reported, not the first.

Weights are not loaded: a model is judged by its configuration, its tokenizer and the headers of its weight files. Of
each data source the first ``ROWS_READ`` rows are read and tokenised as the run would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from actors.config import ModelConfig
from cluster.config import ClusterConfig, PlacementConfig
from cluster.errors import ClusterError
from cluster.nodes import nodes
from cluster.placement import diagnose, plan_bundles
from cluster.session import cluster_address, connect
from data.config import DataConfig
from data.dataset import Dataset
from data.errors import DataError
from data.formats import Kind
from data.tokenizer import load_tokenizer, require_eos
from launch.config import PPORunConfig, RunConfig, SupervisedRunConfig
from launch.errors import Problem
from launch.paths import resolve_data, resolve_model
from launch.roles import cpus_wanted

ROWS_READ = 1000


@dataclass
class CheckReport:
    """What was found. Rich renders it; ``ok`` is whether the run can start."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    places: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is in the way."""
        return not self.problems

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table.grid(padding=(0, 2))
        for what, fact in self.facts:
            facts.add_row(what, fact)
        yield facts
        places = Table("role", "nodes x ranks", "accelerators a rank", "CPUs a rank", "placement group", "layout")
        for place in self.places:
            places.add_row(*place)
        yield places
        for problem in self.problems:
            yield f"[bold red]problem[/] {problem}"
        yield "[bold green]can run[/]" if self.ok else f"[bold red]cannot run[/]: {len(self.problems)} problem(s)"


@dataclass(frozen=True)
class _Wanted:
    """A model that a role needs: where its configuration stands, whether it scores, and the longest sequence."""

    where: str
    model: ModelConfig
    scores: bool
    max_tokens: int


def check(config: RunConfig) -> CheckReport:
    """Look at everything that a run would need."""
    report = CheckReport()
    for wanted in _models(config):
        report.problems += _check_model(wanted, report)
    report.problems += _check_data(config, report)
    report.problems += _check_places(config.placements(), config.cluster, cpus_wanted(config), report)
    return report


def _models(config: RunConfig) -> Iterator[_Wanted]:
    match config:
        case SupervisedRunConfig():
            # A reward model may start from a language model: its head is replaced.
            yield _Wanted("learner.model", config.learner.model, False, config.data.max_tokens)
        case PPORunConfig():
            longest = config.data.max_tokens + config.rollout.sampling.max_response_tokens
            yield _Wanted("policy.model", config.policy.model, False, longest)
            yield _Wanted("critic.model", config.critic.model, True, longest)
            yield _Wanted("reference.model", config.reference.model, False, longest)
            yield _Wanted("reward.model", config.reward.model, True, longest)


def _check_model(wanted: _Wanted, report: CheckReport) -> Iterator[Problem]:
    model = resolve_model(wanted.model)
    try:
        found = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        yield Problem(
            f"{wanted.where}.path",
            f"no model can be read from {model.path}: {reason}",
            "a Hugging Face folder with config.json, or a name on the hub",
        )
        return
    architecture = (found.architectures or ["unknown architecture"])[0]
    report.facts.append((wanted.where, f"{architecture}, {model.path}"))
    yield from _check_limits(wanted, found)
    yield from _check_weights(wanted, model)
    try:
        tokenizer = load_tokenizer(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
        require_eos(tokenizer, f"{wanted.where} ends sequences with it")
    except DataError as error:
        yield Problem(f"{wanted.where}.tokenizer", str(error))


def _check_limits(wanted: _Wanted, found: PreTrainedConfig) -> Iterator[Problem]:
    context = getattr(found, "max_position_embeddings", None)
    if context is not None and wanted.max_tokens > context:
        yield Problem(
            wanted.where,
            f"sequences of {wanted.max_tokens} tokens are longer than the model's context of {context}",
            "lower data.max_tokens or rollout.sampling.max_response_tokens",
        )
    scorer = (found.architectures or [""])[0].endswith("Classification")
    if wanted.scores and scorer and found.num_labels != 1:
        yield Problem(
            wanted.where, f"the model has {found.num_labels} labels", "a model with one label, which is the score"
        )


def _check_weights(wanted: _Wanted, model: ModelConfig) -> Iterator[Problem]:
    folder = Path(model.path)
    if wanted.model.from_scratch or not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and not list(folder.glob("*.bin")):
        right = "weights, or `from_scratch: true` to draw random ones"
        yield Problem(wanted.where, f"{folder} holds no weights", right)
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            yield Problem(wanted.where, f"{file} is damaged: {error}", "the whole file, copied or downloaded again")


def _check_data(config: RunConfig, report: CheckReport) -> Iterator[Problem]:
    kind: Kind = "prompts"
    model = config.policy.model if isinstance(config, PPORunConfig) else config.learner.model
    if isinstance(config, SupervisedRunConfig):
        kind = "comparisons" if config.algorithm.name == "reward_model" else "examples"
    model = resolve_model(model)
    try:
        tokenizer = load_tokenizer(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
    except DataError:
        return  # told of already, with the model
    document = config.algorithm.name == "pretrain"
    try:
        data = Dataset.from_config(
            _first_rows(config.data), kind, tokenizer, seed=config.run.seed, whole_document=document
        )
    except DataError as error:
        yield Problem("data", str(error))
        return
    for counts in data.counts:
        report.facts.append(("data", f"{counts} (of the first {ROWS_READ:,} at most); longest {data.longest} tokens"))


def _first_rows(data: DataConfig) -> DataConfig:
    """The same data, cut to the first rows of each source; nothing is lost to the held-out share of so few."""
    data = resolve_data(data)
    cut = {
        name: tuple(
            source.model_copy(update={"limit_rows": min(source.limit_rows or ROWS_READ, ROWS_READ)})
            for source in getattr(data, name)
        )
        for name in ("train", "heldout")
    }
    return data.model_copy(update={**cut, "heldout_fraction": 0.0})


def _check_places(
    placements: dict[str, PlacementConfig], cluster: ClusterConfig, cpus: float, report: CheckReport
) -> Iterator[Problem]:
    plans = plan_bundles(placements, cluster.accelerator_resource)
    group_of = {role: plan for plan in plans for role in plan.bundle_of_rank}
    for role, placement in placements.items():
        accelerators = f"{placement.gpus_per_rank:g} {cluster.accelerator_resource}" if placement.gpus_per_rank else "-"
        plan = group_of[role]
        report.places.append(
            (
                role,
                f"{placement.num_nodes} x {placement.ranks_per_node}",
                accelerators,
                f"{placement.cpus_per_rank:g}",
                f"{plan.name} ({len(plan.bundles)} bundle{'s' if len(plan.bundles) > 1 else ''})",
                plan.strategy,
            )
        )
    address = cluster_address(cluster)
    try:
        with connect(cluster, num_cpus_wanted=cpus):
            there = nodes()
            for use_free, when in ((False, "the whole cluster"), (True, "what is free now")):
                if reasons := diagnose(plans, there, use_free=use_free):
                    yield from (Problem("cluster", f"{reason} (in {when})") for reason in reasons)
                    break
    except ClusterError as error:
        yield Problem("cluster.address", str(error))
        return
    report.facts.append(("cluster", f"{address or 'this machine'}: {len(there)} node{'s' if len(there) > 1 else ''}"))
