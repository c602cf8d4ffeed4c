"""Configuration of the algorithms. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KLConfig(_Frozen):
    """The penalty that keeps the policy close to the reference, in the reward, token by token."""

    coefficient: float = Field(0.05, ge=0, description="Weight of the KL penalty (the first one, where adaptive).")
    target: PositiveFloat | None = Field(
        None, description="Adaptive controller (Ziegler 2019): KL per sample, summed over tokens, in nats, that the "
        "coefficient is steered to; none keeps the coefficient fixed."
    )
    horizon_samples: PositiveInt = Field(10_000, description="Samples over which the adaptive coefficient moves.")


class RewardShapingConfig(_Frozen):
    """What is done to a reward model's score before it becomes a reward."""

    clip: PositiveFloat | None = Field(None, description="Scores are clipped to [-clip, clip]; none leaves them.")
    missing_eos_score: float | None = Field(
        None, description="Score of a response that did not end by itself; none keeps the reward model's."
    )
    missing_eos_penalty: float = Field(0.0, ge=0, description="Subtracted where a response did not end by itself.")
    whiten: bool = Field(False, description="Scale rewards to unit variance over the global batch (mean kept).")


class PPOConfig(_Frozen):
    """PPO as InstructGPT has it, without the pre-training term."""

    name: Literal["ppo"] = "ppo"
    kl: KLConfig = Field(KLConfig(), description="The penalty towards the reference.")
    reward: RewardShapingConfig = Field(RewardShapingConfig(), description="Shaping of the score.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    whiten_advantages: bool = Field(True, description="Mean 0, std 1 over the tokens of the global batch.")
    clip_ratio: PositiveFloat = Field(0.2, description="The policy ratio is clipped to 1 -+ this.")
    clip_value: PositiveFloat | None = Field(0.2, description="New values stay within this of the old; none: no clip.")
    entropy_coefficient: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    num_epochs: PositiveInt = Field(1, description="Passes over each batch of experience.")
    num_minibatches: PositiveInt = Field(1, description="Optimizer updates per pass.")
    recompute_logprobs: bool = Field(
        False, description="Divide by log-probs that the policy's ranks recompute before training, instead of the "
        "engine's own (advised in bfloat16, where the two differ by about 0.02 nats)."
    )
    critic_warmup_iterations: int = Field(0, ge=0, description="First iterations that train the critic alone.")


class SupervisedConfig(_Frozen):
    """Next-token cross-entropy (pre-training, SFT) or the pairwise ranking loss (reward model)."""

    name: Literal["pretrain", "sft", "reward_model"]
    num_epochs: PositiveFloat = Field(1.0, description="Passes over the training data; may be a fraction.")
    batch_size: PositiveInt = Field(description="Rows (sequences, or comparisons) per optimizer update, all ranks.")
    evaluate_every: PositiveInt | None = Field(None, description="Updates between evaluations; none: only at the end.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Evaluations without improvement after which training stops; none: never."
    )
