"""The rules that hold between the keys of a run's configuration. Imports no torch.

A rule is a function whose parameters are named after the sections it needs; it yields a ``Problem`` for each thing
that is wrong. ``violations`` runs every rule whose sections are there, so that a mistake in one section does not
hide the problems between others.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from actors.config import MAX_ADAPTER_RANK, PolicyConfig, RolloutConfig, ScorerConfig, TrainedRoleConfig
from actors.rewards.config import AnyReward, ModelRewardConfig
from algorithms.config import KLConfig, LearningConfig, OnlineConfig, PreferenceConfig, RewardModelConfig
from algorithms.kl import MAX_ERROR
from cluster.config import ClusterConfig, PlacementConfig
from data.config import DataConfig
from launch.devices import model_role_problems, runs_on_gpu
from launch.errors import Problem
from launch.evaluation_rules import EVALUATION_RULES
from launch.online_rules import ROLE_RULES
from launch.reward_rules import REWARD_RULES, by_place
from launch.settings import OnlineSettings, RunSettings
from launch.unread_rules import LEARNER_RULES, PROMPT_RULES

Rule = Callable[..., Iterable[Problem]]


def violations(rules: Iterable[Rule], sections: Mapping[str, object]) -> list[Problem]:
    """Every problem that ``rules`` find in ``sections`` (by name), rules with a missing section left out."""
    problems: list[Problem] = []
    for rule in rules:
        needed = inspect.signature(rule).parameters
        if sections.keys() >= needed.keys():
            problems.extend(rule(**{name: sections[name] for name in needed}))
    return problems


def batches_divide(online: OnlineSettings, rollout: RolloutConfig) -> Iterator[Problem]:
    """Samples come in whole groups of one prompt."""
    group = rollout.sampling.samples_per_prompt
    yield from _multiple("online.batch_size", online.batch_size, "rollout.sampling.samples_per_prompt", group)
    yield from _multiple(
        "online.scoring_batch_size", online.scoring_batch_size, "rollout.sampling.samples_per_prompt", group
    )


def minibatches_divide(online: OnlineSettings, algorithm: OnlineConfig) -> Iterator[Problem]:
    """Every optimizer update sees the same number of samples."""
    yield from _multiple("online.batch_size", online.batch_size, "algorithm.num_minibatches", algorithm.num_minibatches)


def _multiple(where: str, value: int, of: str, divisor: int) -> Iterator[Problem]:
    if value % divisor:
        below, above = value // divisor * divisor, (value // divisor + 1) * divisor
        options = f"{below} or {above}" if below else f"{above}"
        yield Problem(where, f"{value} is not a multiple of {of} = {divisor}", f"{options} would be")


def online_has_an_end(run: RunSettings, algorithm: OnlineConfig) -> Iterator[Problem]:
    """Prompts are drawn for as long as the run is told to."""
    if run.num_iterations is None:
        right = "an online run has no end of its own: say how many batches to train on"
        yield Problem("run.num_iterations", "is missing", right)
    elif algorithm.critic_warmup_iterations >= run.num_iterations:
        yield Problem(
            "algorithm.critic_warmup_iterations",
            f"{algorithm.critic_warmup_iterations} leaves the policy none of run.num_iterations = {run.num_iterations}",
            "make it smaller",
        )


def kl_can_adapt(algorithm: OnlineConfig, online: OnlineSettings) -> Iterator[Problem]:
    """The adaptive controller multiplies the coefficient: 0 stays 0, and one batch may not take it there."""
    kl, usual = algorithm.kl, KLConfig().horizon_samples
    if kl.target is None:
        if kl.horizon_samples != usual:  # compared by value: a resolved configuration writes out what nobody set
            yield Problem(
                "algorithm.kl.horizon_samples",
                f"{kl.horizon_samples}, but algorithm.kl.target is none: the coefficient is fixed",
                "leave it out, or set algorithm.kl.target",
            )
        return
    if kl.coefficient == 0:
        yield Problem(
            "algorithm.kl.coefficient", "is 0, which the adaptive controller can never leave", "start above 0, say 0.05"
        )
    if MAX_ERROR * (online.batch_size / kl.horizon_samples) >= 1:
        yield Problem(
            "algorithm.kl.horizon_samples",
            f"{kl.horizon_samples} with online.batch_size = {online.batch_size}: one batch with too low a KL would "
            "take the coefficient to 0 or below",
            f"{math.floor(MAX_ERROR * online.batch_size) + 1} or more, usually {usual}",
        )


def samples_fit(
    data: DataConfig,
    rollout: RolloutConfig,
    policy: TrainedRoleConfig,
    critic: TrainedRoleConfig | None,
    reference: ScorerConfig | None,
    reward: AnyReward | None,
    rewards: dict[str, AnyReward],
    baseline: RolloutConfig | None,
) -> Iterator[Problem]:
    """The longest sample (prompt plus response) fits the engine and one pack of every role."""
    response = rollout.max_new_tokens
    longest = data.max_tokens + response
    key = "sampling.max_response_tokens" if rollout.environment is None else "environment.max_tokens"
    parts = f"data.max_tokens {data.max_tokens} + rollout.{key} {response}"
    for name, engines in (("rollout", rollout), ("baseline", baseline)):
        most = None if engines is None else engines.max_model_tokens
        if most is not None and longest > most:
            yield Problem(
                f"{name}.max_model_tokens",
                f"{most} is less than the longest sample, {parts} = {longest} tokens",
                f"at least {longest}, or a smaller part",
            )
    models = {where: one for where, one in by_place(reward, rewards).items() if isinstance(one, ModelRewardConfig)}
    packing = {"policy": policy, "critic": critic, "reference": reference, **models}
    for name, role in packing.items():
        if role is not None:
            yield from _pack_holds(name, role.max_tokens_per_pack, longest, f"the longest sample, {parts}")


def examples_fit(data: DataConfig, algorithm: LearningConfig, learner: TrainedRoleConfig) -> Iterator[Problem]:
    """The longest sequence, or the two of a comparison, fit one pack."""
    longest, what = data.max_tokens, "the longest sequence, data.max_tokens"
    if isinstance(algorithm, RewardModelConfig | PreferenceConfig):
        longest, what = 2 * longest, "the longest comparison, two responses of data.max_tokens"
    yield from _pack_holds("learner", learner.max_tokens_per_pack, longest, what)


def _pack_holds(role: str, budget: int, longest: int, what: str) -> Iterator[Problem]:
    if budget < longest:
        yield Problem(
            f"{role}.max_tokens_per_pack", f"{budget} is less than {what} = {longest} tokens", f"at least {longest}"
        )


def evaluation_has_data(data: DataConfig, algorithm: LearningConfig) -> Iterator[Problem]:
    """Evaluation needs held-out data, early stopping needs evaluation."""
    if algorithm.evaluate_every is not None and not data.heldout and not data.heldout_fraction:
        yield Problem(
            "algorithm.evaluate_every", "there is nothing to evaluate on", "give data.heldout or data.heldout_fraction"
        )
    if algorithm.early_stopping_patience is not None and algorithm.evaluate_every is None:
        yield Problem(
            "algorithm.early_stopping_patience", "counts evaluations, and there are none", "set evaluate_every"
        )


def roles_suit_devices(
    cluster: ClusterConfig,
    policy: TrainedRoleConfig,
    critic: TrainedRoleConfig | None,
    reference: ScorerConfig | None,
) -> Iterator[Problem]:
    """What needs a GPU has one."""
    for name, trained in (("policy", policy), ("critic", critic)):
        if trained is not None:
            yield from _trained_role(name, trained, cluster)
    if reference is not None:
        yield from model_role_problems("reference", reference, reference.model, cluster)


def learner_suits_device(cluster: ClusterConfig, learner: TrainedRoleConfig) -> Iterator[Problem]:
    """What needs a GPU has one."""
    yield from _trained_role("learner", learner, cluster)


def reference_is_of_use(
    cluster: ClusterConfig, data: DataConfig, algorithm: LearningConfig, reference: ScorerConfig | None
) -> Iterator[Problem]:
    """A reference role is compared with, can hold a sequence, and suits its device."""
    if reference is None:
        return
    if not algorithm.needs_reference:
        yield Problem("reference", f"{algorithm.name} compares with no reference", "remove the section")
    if reference.colocate is not None:
        yield Problem("reference.colocate", "the reference is gone before the learner is placed", "leave it out")
    what = "the longest sequence, data.max_tokens"
    yield from _pack_holds("reference", reference.max_tokens_per_pack, data.max_tokens, what)
    yield from model_role_problems("reference", reference, reference.model, cluster)


def _trained_role(name: str, role: TrainedRoleConfig, cluster: ClusterConfig) -> Iterator[Problem]:
    yield from model_role_problems(name, role, role.model, cluster)
    if not runs_on_gpu(role, cluster):
        for key in ("offload_optimizer", "offload_params"):
            if getattr(role.zero, key):
                yield Problem(
                    f"{name}.zero.{key}", "moves state from GPU to CPU, and this role runs on CPU", "leave it out"
                )


def engines_suit_devices(
    cluster: ClusterConfig, rollout: RolloutConfig, baseline: RolloutConfig | None
) -> Iterator[Problem]:
    """An engine has as many GPUs as it is spread over, and leaves room for who shares them."""
    for name, engines in (("rollout", rollout), ("baseline", baseline)):
        if engines is not None:
            yield from _engine_suits_device(name, engines, cluster)


def _engine_suits_device(name: str, rollout: RolloutConfig, cluster: ClusterConfig) -> Iterator[Problem]:
    size, gpus = rollout.tensor_parallel_size, rollout.gpus_per_rank
    if not runs_on_gpu(rollout, cluster):
        if size > 1:
            yield Problem(
                f"{name}.tensor_parallel_size", f"{size}, but the engines run on CPU", "1, and more in ranks_per_node"
            )
        return
    if size > 1 and gpus != size:
        yield Problem(f"{name}.gpus_per_rank", f"{gpus:g}, but tensor_parallel_size is {size}", f"{size}")
    if size == 1 and gpus > 1:
        yield Problem(
            f"{name}.gpus_per_rank", f"{gpus:g}, but tensor_parallel_size is 1", "make the two equal, or 1 GPU a rank"
        )
    if gpus < 1 and rollout.kv_cache_bytes is None and rollout.gpu_memory_fraction > gpus:
        yield Problem(
            f"{name}.gpu_memory_fraction",
            f"the engine takes {rollout.gpu_memory_fraction:g} of a GPU's memory but has {gpus:g} of the GPU",
            f"at most {gpus:g}, or set kv_cache_bytes",
        )


def weights_can_travel(cluster: ClusterConfig, policy: PolicyConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """The way of the weights exists between where they are trained and where they are used."""
    way, where = rollout.weight_transfer, "rollout.weight_transfer"
    on_gpu = [runs_on_gpu(role, cluster) for role in (policy, rollout)]
    shared = policy.colocate is not None and policy.colocate == rollout.colocate
    if way in ("nccl", "ipc") and not all(on_gpu):
        cpu = " and ".join(name for name, gpu in zip(("policy", "rollout"), on_gpu, strict=True) if not gpu)
        yield Problem(where, f"{way} goes from GPU to GPU, and {cpu} runs on CPU", "auto or shared_memory")
    elif way == "ipc" and not shared:
        yield Problem(where, "ipc needs policy and engine on the same GPU", "nccl, or one `colocate` for both")
    elif way == "nccl" and shared and policy.gpus_per_rank < 1:
        yield Problem(where, "nccl cannot connect two processes on one GPU, and policy and rollout share theirs", "ipc")
    elif way == "shared_memory" and on_gpu[1] and rollout.lora == "merged":
        yield Problem(where, "shared_memory is for engines on CPU", "auto, nccl or ipc")


def adapter_can_travel(policy: PolicyConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """Engines can run with the policy's adapter as it is."""
    where, lora = "rollout.lora", policy.tuning.lora
    if rollout.lora == "merged":
        return
    if not policy.tuning.has_adapter:
        yield Problem(where, "adapter, but policy.tuning.method is full: there is none", "merged")
    elif lora.use_dora:
        yield Problem(where, "adapter, but vLLM's LoRA has no DoRA", "merged, or leave policy.tuning.lora.use_dora off")
    elif lora.rank > MAX_ADAPTER_RANK:
        yield Problem(
            where, f"adapter, but its rank is {lora.rank} and vLLM takes at most {MAX_ADAPTER_RANK}", "merged"
        )
    if rollout.weight_transfer in ("nccl", "ipc"):
        yield Problem(
            "rollout.weight_transfer", f"{rollout.weight_transfer}, but adapters travel through shared memory", "auto"
        )


def colocation(
    policy: PlacementConfig,
    critic: PlacementConfig | None,
    reference: PlacementConfig | None,
    reward: PlacementConfig | None,
    rewards: dict[str, PlacementConfig],
    rollout: PlacementConfig,
    baseline: PlacementConfig | None,
) -> Iterator[Problem]:
    """Roles of one colocation group share one accelerator rank by rank."""
    given = {
        "policy": policy,
        "critic": critic,
        "reference": reference,
        "reward": reward,
        **rewards,
        "rollout": rollout,
        "baseline": baseline,
    }
    where = {name: f"rewards.{name}" if name in rewards else name for name in given}
    roles = {name: role for name, role in given.items() if role is not None}
    groups: dict[str, list[str]] = {}
    for name, role in roles.items():
        if role.colocate is not None:
            groups.setdefault(role.colocate, []).append(name)
    for group, names in groups.items():
        first = names[0]
        if group in (*roles, "credit", "source") and group not in names:
            right = f"give {group} the same `colocate`" if group in roles else "choose another name"
            yield Problem(f"{where[first]}.colocate", f"{group!r} names a role that is not in this group", right)
            continue
        if len(names) == 1:
            others = [other for other in groups if other != group]
            right = f"give another role the same name (groups here: {', '.join([group, *others])}), or leave it out"
            yield Problem(f"{where[first]}.colocate", f"{first} is alone in group {group!r}", right)
            continue
        shape = _shape(roles[first])
        for name in names[1:]:
            if _shape(roles[name]) != shape:
                yield Problem(
                    f"{where[name]}.colocate",
                    f"group {group!r} is shared rank by rank, but {name} has {_in_words(roles[name])} and "
                    f"{first} has {_in_words(roles[first])}",
                    "give them the same num_nodes, ranks_per_node and strategy",
                )
        total = sum(roles[name].gpus_per_rank for name in names)
        if total > 1 + 1e-9 and len([name for name in names if roles[name].gpus_per_rank]) > 1:
            parts = " + ".join(f"{name} {roles[name].gpus_per_rank:g}" for name in names)
            yield Problem(
                f"{where[first]}.gpus_per_rank",
                f"group {group!r} shares one accelerator per rank, and {parts} = {total:g}",
                "fractions that add up to at most 1",
            )


def _shape(role: PlacementConfig) -> tuple[int, int, str]:
    return role.num_nodes, role.ranks_per_node, role.strategy


def _in_words(role: PlacementConfig) -> str:
    return f"{role.num_nodes} x {role.ranks_per_node} ranks laid out {role.strategy}"


ONLINE_RULES: tuple[Rule, ...] = (
    *ROLE_RULES,
    *EVALUATION_RULES,
    *REWARD_RULES,
    batches_divide,
    minibatches_divide,
    online_has_an_end,
    kl_can_adapt,
    samples_fit,
    roles_suit_devices,
    engines_suit_devices,
    weights_can_travel,
    adapter_can_travel,
    colocation,
    *PROMPT_RULES,
)
SUPERVISED_RULES: tuple[Rule, ...] = (
    examples_fit, *LEARNER_RULES, evaluation_has_data, learner_suits_device
)
