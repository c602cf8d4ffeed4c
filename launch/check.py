"""``troupe check``: everything about a run that can be known before an accelerator is taken.

The configuration's own rules have been checked by the time this is called. Here are those that need the models, the
data and the cluster. All problems are reported, not the first.

Weights are not loaded: a model is judged by its configuration, its tokenizer and the headers of its weight files. Of
each data source the first ``ROWS_READ`` rows are read and tokenised as the run would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
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
from data.tokenizer import Tokenizer, load_tokenizer, require_eos
from launch.config import PPORunConfig, RunConfig, SupervisedRunConfig
from launch.errors import Problem, RunDirError
from launch.paths import resolve_data, resolve_model
from launch.roles import cpus_wanted
from launch.rundir import RunDir

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
            facts.add_row(what, Text(fact))  # not markup: paths and messages hold brackets
        yield facts
        places = Table("role", "nodes x ranks", "accelerators a rank", "CPUs a rank", "placement group", "layout")
        for place in self.places:
            places.add_row(*place)
        yield places
        for problem in self.problems:
            yield Text.assemble(("problem", "bold red"), f" {problem}")
        yield "[bold green]can run[/]" if self.ok else f"[bold red]cannot run[/]: {len(self.problems)} problem(s)"


@dataclass(frozen=True)
class _Wanted:
    """A model that a role needs: where its configuration stands, what it must be, and the longest sequence.

    ``new scorer`` may also start from a language model, whose head is replaced. ``same_tokens`` is for a role that
    reads the policy's tokens as they are.
    """

    where: str
    model: ModelConfig
    kind: Literal["language model", "scorer", "new scorer"]
    max_tokens: int
    same_tokens: bool = False


def check(config: RunConfig) -> CheckReport:
    """Look at everything that a run would need."""
    report = CheckReport()
    report.problems += _check_folder(config, report)
    tokenizers: dict[str, Tokenizer] = {}
    for wanted in _models(config):
        report.problems += _check_model(wanted, report, tokenizers)
    report.problems += _check_data(config, report)
    report.problems += _check_places(config.placements(), config.cluster, cpus_wanted(config), report)
    return report


def _models(config: RunConfig) -> Iterator[_Wanted]:
    match config:
        case SupervisedRunConfig():
            kind: Literal["language model", "new scorer"] = "language model"
            if config.algorithm.name == "reward_model":
                kind = "new scorer"
            yield _Wanted("learner.model", config.learner.model, kind, config.data.max_tokens)
        case PPORunConfig():
            longest = config.data.max_tokens + config.rollout.sampling.max_response_tokens
            engine = max(longest, config.rollout.max_model_tokens or 0)
            yield _Wanted("policy.model", config.policy.model, "language model", engine)
            yield _Wanted("critic.model", config.critic.model, "new scorer", longest, same_tokens=True)
            yield _Wanted("reference.model", config.reference.model, "language model", longest, same_tokens=True)
            yield _Wanted("reward.model", config.reward.model, "scorer", longest)


def _check_folder(config: RunConfig, report: CheckReport) -> Iterator[Problem]:
    try:
        run_dir = RunDir.of(config)
    except RunDirError as error:
        yield Problem("run.root", str(error))
        return
    state = ", begun already: --resume goes on with it" if run_dir.config.exists() else ""
    report.facts.append(("run", f"{run_dir.path}{state}"))


def _check_model(wanted: _Wanted, report: CheckReport, tokenizers: dict[str, Tokenizer]) -> Iterator[Problem]:
    model = resolve_model(wanted.model)
    try:
        found = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        absent = Path(model.path).is_absolute() and not Path(model.path).exists()
        reason = "no such folder" if absent else str(error).strip().splitlines()[0]
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
        return
    tokenizers[wanted.where] = tokenizer
    policy = tokenizers.get("policy.model")
    if wanted.same_tokens and policy is not None and tokenizer.get_vocab() != policy.get_vocab():
        right = "a model of the policy's family"
        yield Problem(wanted.where, "its tokenizer is not the policy's, whose tokens it is given", right)


def _check_limits(wanted: _Wanted, found: PreTrainedConfig) -> Iterator[Problem]:
    context = getattr(found, "max_position_embeddings", None)
    if context is not None and wanted.max_tokens > context:
        yield Problem(
            wanted.where,
            f"sequences of {wanted.max_tokens} tokens are longer than the model's context of {context}",
            "lower data.max_tokens, rollout.sampling.max_response_tokens or rollout.max_model_tokens",
        )
    architecture = (found.architectures or ["unknown"])[0]
    scores = architecture.endswith("Classification")
    if wanted.kind == "language model" and scores:
        yield Problem(wanted.where, f"{architecture} is no language model", "a causal language model")
    elif wanted.kind == "scorer" and (not scores or wanted.model.from_scratch):
        right = "a trained model with one label, such as a reward_model run makes"
        yield Problem(wanted.where, f"{architecture} has no trained head: every reward would be 0", right)
    elif wanted.kind != "language model" and scores and found.num_labels != 1:
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
    for index in folder.glob("*.index.json"):
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            yield Problem(wanted.where, f"{folder} lacks {', '.join(missing)}", f"all {len(shards)} files of the model")
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
