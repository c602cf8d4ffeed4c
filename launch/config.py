"""The configuration of a run: one YAML, composed of the roles', the algorithm's and the data's own models.

Invariant: a ``RunConfig`` that exists has passed every rule that needs nothing but itself (``launch.rules``). Rules
that need the model, the data or the cluster are in ``launch.check``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.config import (
    CriticConfig,
    PolicyConfig,
    ReferenceConfig,
    RolloutConfig,
    TrainedRoleConfig,
)
from actors.rewards.combination_config import TotalConfig
from actors.rewards.config import AnyReward
from algorithms.config import (
    FeedbackConfig,
    LearningConfig,
    OnlineConfig,
    PreferenceConfig,
    RewardModelConfig,
    SupervisedConfig,
)
from cluster.config import ClusterConfig, FrozenConfig, PlacementConfig
from data.config import DataConfig
from data.formats import Kind
from launch.errors import RuleViolations
from launch.reward_rules import by_role, reward_names
from launch.rules import ONLINE_RULES, SUPERVISED_RULES, Rule, reference_is_of_use, violations
from launch.settings import EvaluationSettings, NormaliseSettings, OnlineSettings, RunSettings, checker_role

__all__ = [
    "AnyLearnerRunConfig",
    "BaseRunConfig",
    "FeedbackRunConfig",
    "LearnerRunConfig",
    "OnlineRunConfig",
    "OnlineSettings",
    "PreferenceRunConfig",
    "ReferredRunConfig",
    "RewardModelRunConfig",
    "RunConfig",
    "RunSettings",
    "SupervisedRunConfig",
]

#: Roles that hold no model: they take little, and sit wherever there is room.
SMALL_ROLE = PlacementConfig(cpus_per_rank=0.5, threads_per_rank=1)


def _model_unless_said(reward: object) -> object:
    """`reward: {model: ...}` is short for one of `kind: model`."""
    return {"kind": "model", **reward} if isinstance(reward, dict) else reward


class BaseRunConfig(FrozenConfig):
    """What every run has."""

    RULES: ClassVar[tuple[Rule, ...]] = ()
    ROLES: ClassVar[tuple[str, ...]] = ()
    SMALL_ROLES: ClassVar[tuple[str, ...]] = ()

    run: RunSettings = Field(description="The run itself.")
    data: DataConfig = Field(description="What comes in.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster that the run uses.")

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        problems = violations(self.RULES, {name: getattr(self, name) for name in type(self).model_fields})
        if problems:
            raise RuleViolations(problems)
        return self

    def placements(self) -> dict[str, PlacementConfig]:
        """The placement of every role of the run, by the role's name."""
        given: dict[str, PlacementConfig | None] = {name: getattr(self, name) for name in self.ROLES}
        placed = {name: placement for name, placement in given.items() if placement is not None}
        return placed | dict.fromkeys(self.SMALL_ROLES, SMALL_ROLE)

    def placements_before(self) -> dict[str, PlacementConfig]:
        """The placement of every role of what comes before the run proper, and ends before it; most have none."""
        return {}

    def cpus_wanted(self) -> float:
        """The most CPU cores that all ranks set aside together at a time."""
        times = (self.placements_before(), self.placements())
        return max(sum(role.num_ranks * role.cpus_per_rank for role in roles.values()) for roles in times)


class LearnerRunConfig(BaseRunConfig):
    """A run that learns from a data set: one trained role, the learner."""

    RULES = SUPERVISED_RULES
    ROLES = ("learner",)
    SMALL_ROLES = ("source",)
    #: What the rows of the data become.
    DATA_KIND: ClassVar[Kind] = "examples"

    algorithm: LearningConfig = Field(description="What is learnt, and for how long.")
    learner: TrainedRoleConfig = Field(description="The model that is trained.")


class SupervisedRunConfig(LearnerRunConfig):
    """Pre-training or SFT."""

    algorithm: SupervisedConfig = Field(description="What is learnt, and for how long.")


class RewardModelRunConfig(LearnerRunConfig):
    """A reward model."""

    DATA_KIND = "comparisons"

    algorithm: RewardModelConfig = Field(description="What is learnt, and for how long.")
    normalise: NormaliseSettings | None = Field(
        None, description="Where the exported model's scores lie; `normalise: demonstrations` is short for a section "
        "with `by` alone. None: where training leaves them."
    )


class ReferredRunConfig(LearnerRunConfig):
    """A learner that is compared with a reference: a role of its own, or else the learner's model as it starts."""

    RULES = (*SUPERVISED_RULES, reference_is_of_use)

    reference: ReferenceConfig | None = Field(
        None, description="The model that the learner is compared with. It scores all data once, before the learner is "
        "placed, and gives its accelerators back. None: the learner's own as it starts (with an adapter: its base)."
    )

    def placements_before(self) -> dict[str, PlacementConfig]:
        """The reference's, and that of the source, which it scores."""
        if self.reference is None:
            return {}
        return {"reference": self.reference} | dict.fromkeys(self.SMALL_ROLES, SMALL_ROLE)


class PreferenceRunConfig(ReferredRunConfig):
    """DPO and its kin."""

    DATA_KIND = "comparisons"

    algorithm: PreferenceConfig = Field(description="What is learnt, and for how long.")


class FeedbackRunConfig(ReferredRunConfig):
    """KTO."""

    DATA_KIND = "feedback"

    algorithm: FeedbackConfig = Field(description="What is learnt, and for how long.")


class OnlineRunConfig(BaseRunConfig):
    """PPO, GRPO and their kin: each role on its own group of processes. Which there are, the algorithm says."""

    RULES = ONLINE_RULES
    ROLES = ("policy", "critic", "reference", "reward", "rollout", "baseline")
    SMALL_ROLES = ("credit", "source")

    algorithm: OnlineConfig = Field(description="How the policy learns.")
    online: OnlineSettings = Field(description="How experience flows.")
    policy: PolicyConfig = Field(description="The model that is trained.")
    critic: CriticConfig | None = Field(
        None, description="The model that estimates what a prefix is worth; where the algorithm needs one (PPO), and "
        "only there."
    )
    reference: ReferenceConfig | None = Field(
        None, description="The model that the policy is held close to. Not needed where algorithm.kl.coefficient is 0, "
        "nor with an adapter, whose base it is then; refused with policy.ema_is_reference."
    )
    rewards: dict[str, AnyReward] = Field(
        {}, description="What responses are worth, by names of your own: each reward is a role of that name."
    )
    reward: Annotated[AnyReward | None, BeforeValidator(_model_unless_said)] = Field(
        None, description="Instead of `rewards`: the only one, whose role is called `reward`. The same keys; without "
        "`kind` it is a reward model."
    )
    total: TotalConfig = Field(TotalConfig(), description="How the rewards become one score, and what shapes it.")
    rollout: RolloutConfig = Field(description="The engines that generate.")
    baseline: RolloutConfig | None = Field(
        None, description="Engines that keep the weights that the policy began with, and answer each prompt once; "
        "where the algorithm compares with them (initial_baseline), and only there."
    )
    evaluation: EvaluationSettings | None = Field(
        None, description="Answering held-out prompts (`data.heldout` or `data.heldout_fraction`) at intervals. None: "
        "nothing is evaluated."
    )
    pretraining_data: DataConfig | None = Field(
        None, description="Text that the policy goes on learning beside its samples (PPO-ptx), as `pretrain` reads it."
    )

    def placements(self) -> dict[str, PlacementConfig]:
        """The placement of every role of the run, by the role's name."""
        more = {} if self.pretraining_data is None else {"pretraining_source": SMALL_ROLE}
        checkers = {} if self.evaluation is None else self.evaluation.checkers
        checking = {checker_role(name): checker for name, checker in checkers.items()}
        return super().placements() | self.rewards | more | checking

    @property
    def reward_roles(self) -> dict[str, AnyReward]:
        """Every reward by the name of its role, in the order that their scores travel in."""
        return by_role(self.reward, self.rewards)

    @property
    def score_names(self) -> tuple[str, ...]:
        """What scores travel under, in order: the rewards by name, and the environment."""
        return reward_names(self.reward, self.rewards, self.rollout)

    @property
    def policy_is_reference(self) -> bool:
        """Whether the policy's ranks hold what it is held close to: its base, the adapter off, or its average."""
        wanted = self.algorithm.kl.coefficient > 0
        return self.policy.ema_is_reference or (self.reference is None and wanted and self.policy.tuning.has_adapter)


AnyLearnerRunConfig = SupervisedRunConfig | RewardModelRunConfig | PreferenceRunConfig | FeedbackRunConfig
RunConfig = AnyLearnerRunConfig | OnlineRunConfig
