"""From a run's configuration to the groups of processes that carry it out.

Here, and nowhere else, is written which class plays which role and what it is given.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, cast

from actors.config import CriticConfig, PolicyConfig, ReferenceConfig, TrainedRoleConfig
from actors.credit import CreditActor
from actors.critic import CriticActor
from actors.learner import LearnerActor
from actors.policy import PolicyActor
from actors.reference import DataReferenceActor, ReferenceActor
from actors.reward import RewardActor
from actors.rewards.actor import TextRewardActor
from actors.rewards.config import JudgeRewardConfig, ModelRewardConfig
from actors.rollout import RolloutActor, engine_environment
from actors.source import SourceActor
from cluster.config import PlacementConfig
from cluster.group import RoleGroup, RoleSpec
from cluster.placement import place, plan_bundles
from launch.config import (
    BaseRunConfig,
    LearnerRunConfig,
    OnlineRunConfig,
    ReferredRunConfig,
    SupervisedRunConfig,
)
from launch.data_rules import keeps_ties
from launch.devices import runs_on_gpu
from launch.paths import resolve_data, resolve_model, resolve_reward, resolve_rollout
from launch.publish import adapter_rank, weight_transfer
from launch.settings import checker_role
from launch.tasks import task_group

#: Added to the run's seed. With the policy's own, a baseline would be drawn with the very randomness of the sample that
#: it is compared with: while the weights are the same, so would the responses be, and every advantage 0.
BASELINE_SEED = 1_000_003

T = TypeVar("T")
RoleT = TypeVar("RoleT", TrainedRoleConfig, PolicyConfig, CriticConfig, ReferenceConfig)
#: Their methods are coroutines.
ASYNC_ROLES = (RolloutActor, TextRewardActor)
#: Either kind of reward: of a reward model, or over text.
RewardGroup = RoleGroup[RewardActor] | RoleGroup[TextRewardActor]


class Start(Protocol):
    """Starts a role in its place: ``await start(PolicyActor, "policy", (config, ...))``."""

    async def __call__(self, role_class: Callable[..., T], role: str, args: Sequence[object]) -> RoleGroup[T]:
        """Construct ``role_class(context, *args)`` on every rank of ``role``."""
        ...


@dataclass(frozen=True)
class SupervisedRoles:
    """The roles of a run that learns from a data set."""

    source: RoleGroup[SourceActor]
    learner: RoleGroup[LearnerActor]


@dataclass(frozen=True)
class ReferenceRoles:
    """The roles that are there while a reference scores a data set."""

    source: RoleGroup[SourceActor]
    reference: RoleGroup[DataReferenceActor]


@dataclass(frozen=True)
class OnlineRoles:
    """The roles of an online run; none where it does without."""

    source: RoleGroup[SourceActor]
    policy: RoleGroup[PolicyActor]
    critic: RoleGroup[CriticActor] | None
    reference: RoleGroup[ReferenceActor] | None
    rewards: Mapping[str, RewardGroup]
    rollout: RoleGroup[RolloutActor]
    credit: RoleGroup[CreditActor]
    baseline: RoleGroup[RolloutActor] | None = None
    pretraining_source: RoleGroup[SourceActor] | None = None
    checkers: Mapping[str, RoleGroup[TextRewardActor]] = field(default_factory=dict)


@asynccontextmanager
async def supervised_roles(config: LearnerRunConfig, log_dir: Path) -> AsyncIterator[SupervisedRoles]:
    """Place and start the roles of a run that learns from a data set; end them on the way out."""
    learner = _resolved(config.learner)
    async with _starter(config, config.placements(), log_dir) as start:
        async with task_group() as starting:
            source = starting.create_task(start(SourceActor, "source", _source_args(config)))
            learnt = (learner, config.algorithm, config.run.seed)
            trained = starting.create_task(start(LearnerActor, "learner", learnt))
        yield SupervisedRoles(source.result(), trained.result())


@asynccontextmanager
async def reference_roles(config: ReferredRunConfig, log_dir: Path) -> AsyncIterator[ReferenceRoles]:
    """Place and start what scores a data set before the learner has its place; all is given back on the way out.

    Raises:
        ValueError: the run has no reference of its own.
    """
    if config.reference is None:
        raise ValueError(f"run {config.run.name} has no reference role")
    async with _starter(config, config.placements_before(), log_dir) as start:
        async with task_group() as starting:
            source = starting.create_task(start(SourceActor, "source", _source_args(config)))
            scorer = starting.create_task(start(DataReferenceActor, "reference", (_resolved(config.reference),)))
        yield ReferenceRoles(source.result(), scorer.result())


def _source_args(config: LearnerRunConfig) -> tuple[object, ...]:
    whole_document = isinstance(config, SupervisedRunConfig) and config.algorithm.name == "pretrain"
    model = resolve_model(config.learner.model)
    return resolve_data(config.data), config.DATA_KIND, model, config.run.seed, whole_document, keeps_ties(config)


@asynccontextmanager
async def online_roles(config: OnlineRunConfig, log_dir: Path) -> AsyncIterator[OnlineRoles]:
    """Place and start the roles of an online run, all at the same time; end them on the way out."""
    policy = _resolved(config.policy)
    critic = None if config.critic is None else _resolved(config.critic)
    reference = None if config.reference is None else _resolved(config.reference)
    sampling, algorithm, seed = config.rollout.sampling, config.algorithm, config.run.seed
    num_iterations = config.run.num_iterations
    data = resolve_data(config.data)
    way = weight_transfer(policy, config.rollout, config.cluster)
    rollout = resolve_rollout(config.rollout).model_copy(update={"weight_transfer": way})
    async with _starter(config, config.placements(), log_dir) as start:
        async with task_group() as starting:
            source = starting.create_task(start(SourceActor, "source", (data, "prompts", policy.model, seed)))
            compared = mixed_in = None
            if (baseline := config.baseline) is not None:
                way = weight_transfer(policy, baseline, config.cluster)
                engines = baseline.model_copy(update={"weight_transfer": way})
                answering = (engines, policy.model, seed + BASELINE_SEED)
                compared = starting.create_task(start(RolloutActor, "baseline", answering))
            if config.pretraining_data is not None:
                text = (resolve_data(config.pretraining_data), "examples", policy.model, seed, True)
                mixed_in = starting.create_task(start(SourceActor, "pretraining_source", text))
            learnt = (policy, algorithm, config.rollout.sample_sampling, seed, num_iterations)
            learned = starting.create_task(start(PolicyActor, "policy", learnt))
            valued = referred = None
            if critic is not None:
                valued = starting.create_task(start(CriticActor, "critic", (critic, algorithm, seed, num_iterations)))
            if reference is not None:
                referred = starting.create_task(start(ReferenceActor, "reference", (reference, sampling)))
            rewarded = {name: starting.create_task(_start_reward(config, name, start)) for name in config.reward_roles}
            checkers = {} if config.evaluation is None else config.evaluation.checkers
            checked = {
                name: starting.create_task(
                    start(TextRewardActor, checker_role(name), (resolve_reward(checker), policy.model))
                )
                for name, checker in checkers.items()
            }
            engine_args = (rollout, policy.model, seed, adapter_rank(policy, rollout))
            rolled_out = starting.create_task(start(RolloutActor, "rollout", engine_args))
            scored = (config.rollout.max_drawn_tokens, config.score_names, config.total)
            credited = starting.create_task(start(CreditActor, "credit", (algorithm, *scored)))
        rewards = {name: reward.result() for name, reward in rewarded.items()}
        checking = {name: checker.result() for name, checker in checked.items()}
        yield OnlineRoles(
            source.result(),
            learned.result(),
            valued.result() if valued is not None else None,
            referred.result() if referred is not None else None,
            rewards,
            rolled_out.result(),
            credited.result(),
            compared.result() if compared is not None else None,
            mixed_in.result() if mixed_in is not None else None,
            checking,
        )
        # After a failure their processes are killed, and what they started ends with them.
        for name, group in rewards.items():
            if config.reward_roles[name].kind != "model":
                await cast(RoleGroup[TextRewardActor], group).call(TextRewardActor.shutdown)
        for checker in checking.values():
            await checker.call(TextRewardActor.shutdown)


async def _start_reward(config: OnlineRunConfig, name: str, start: Start) -> RewardGroup:
    reward, model = resolve_reward(config.reward_roles[name]), resolve_model(config.policy.model)
    if isinstance(reward, ModelRewardConfig):
        return await start(RewardActor, name, (reward, model))
    return await start(TextRewardActor, name, (reward, model))


@asynccontextmanager
async def _starter(
    config: BaseRunConfig, wanted: Mapping[str, PlacementConfig], log_dir: Path
) -> AsyncIterator[Start]:
    """Place some roles of a run; gives the function that starts one of them. All end with the block."""
    placement = await place(plan_bundles(wanted, config.cluster.accelerator_resource), config.cluster)

    async def start(role_class: Callable[..., T], role: str, args: Sequence[object]) -> RoleGroup[T]:
        generates = role in ("rollout", "baseline") or isinstance(wanted[role], JudgeRewardConfig)
        spec = RoleSpec(
            role,
            wanted[role],
            config.run.seed,
            log_dir,
            environment=engine_environment(runs_on_gpu(wanted[role], config.cluster)) if generates else {},
            is_async=role_class in ASYNC_ROLES,
        )
        return await RoleGroup.start(role_class, spec, placement, config.cluster, args)

    try:
        yield start
    finally:
        placement.release()


def _resolved(config: RoleT) -> RoleT:
    """A role's configuration with the paths of its model made absolute."""
    return config.model_copy(update={"model": resolve_model(config.model)})
