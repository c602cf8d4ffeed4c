"""The configuration of a run: one YAML, composed of the roles', the algorithm's and the data's own models.

Invariant: a ``RunConfig`` that exists has passed every rule that needs nothing but itself. Rules that need the
model, the data or the cluster are in ``launch.check``.
"""

from __future__ import annotations

from pydantic import Field

from actors.config import (
    CriticConfig,
    PolicyConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    TrainedRoleConfig,
)
from algorithms.config import PPOConfig, SupervisedConfig
from cluster.config import ClusterConfig, FrozenConfig, PositiveInt
from data.config import DataConfig


class RunSettings(FrozenConfig):
    """The run itself: its name, its length, what it keeps."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run's folder.")
    root: str = Field(
        "runs", description="Folder of all runs. On several nodes: one that all of them see. Relative paths here and in "
        "model and data paths start at $TROUPE_HOME, or else at the current folder."
    )
    seed: int = Field(0, ge=0, description="Seeds data order, sampling and initial weights.")
    num_iterations: PositiveInt | None = Field(
        None, description="PPO: batches of experience to train on. Supervised: updates, where fewer than num_epochs give."
    )
    checkpoint_every: PositiveInt | None = Field(
        None, description="Iterations (or updates) between checkpoints; none: at the end and when stopped."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints kept.")
    keep_experience: bool = Field(False, description="Keep each iteration's experience as an Arrow file.")
    log_every: PositiveInt = Field(1, description="Iterations (or updates) between lines of progress.")


class OnlineSettings(FrozenConfig):
    """How experience flows from the engines to the trainers."""

    batch_size: PositiveInt = Field(description="Samples per training iteration.")
    max_staleness: int = Field(
        0, ge=0, description="Policy versions that generation may run ahead of training: 0 is on-policy PPO."
    )
    scoring_batch_size: PositiveInt = Field(
        64, description="Samples that are scored together as soon as that many are generated."
    )


class BaseRunConfig(FrozenConfig):
    """What every run has."""

    run: RunSettings
    data: DataConfig
    cluster: ClusterConfig = ClusterConfig()


class SupervisedRunConfig(BaseRunConfig):
    """Pre-training, SFT or a reward model: one trained role, the learner."""

    algorithm: SupervisedConfig
    learner: TrainedRoleConfig = Field(description="The model that is trained.")


class PPORunConfig(BaseRunConfig):
    """PPO: five roles, each on its own group of processes."""

    algorithm: PPOConfig
    online: OnlineSettings
    policy: PolicyConfig
    critic: CriticConfig
    reference: ReferenceConfig
    reward: RewardConfig
    rollout: RolloutConfig


RunConfig = SupervisedRunConfig | PPORunConfig
