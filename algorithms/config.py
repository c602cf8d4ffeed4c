"""Configuration of the algorithms. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class OnlineConfig(_Frozen):
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


class LearningConfig(_Frozen):
    """What all ways of learning from a data set have."""

    name: str
    num_epochs: PositiveFloat = Field(1.0, description="Passes over the training data; may be a fraction.")
    batch_size: PositiveInt = Field(
        description="Rows (sequences, comparisons, or judged responses) per optimizer update, all ranks."
    )
    evaluate_every: PositiveInt | None = Field(None, description="Updates between evaluations; none: only at the end.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Evaluations without improvement after which training stops; none: never."
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return False


class SupervisedConfig(LearningConfig):
    """Next-token cross-entropy: pre-training, or SFT."""

    name: Literal["pretrain", "sft"]


class RewardModelConfig(LearningConfig):
    """A reward model, from comparisons of two or more responses."""

    name: Literal["reward_model"] = "reward_model"
    loss: Literal["ranking", "soft_labels", "best_of"] = Field(
        "ranking",
        description="`ranking`: all pairs of a prompt's responses, each response forwarded once, ties left out, less "
        "the data's margin (InstructGPT; Llama 2). `soft_labels`: two responses and the probability that the first is "
        "better. `best_of`: the best against all others (softmax).",
    )
    centring_coefficient: float = Field(
        0.0, ge=0, description="Weight of the square of each prompt's summed scores, which keeps scores around 0."
    )


PreferenceLoss = Literal[
    "dpo",
    "conservative_dpo",
    "robust_dpo",
    "reference_free_dpo",
    "ipo",
    "hinge",
    "slic",
    "simpo",
    "orpo",
]
#: Losses that compare the policy with the model it started from.
NEEDS_REFERENCE: frozenset[str] = frozenset({"dpo", "conservative_dpo", "robust_dpo", "ipo", "hinge"})
#: The losses that each of these keys belongs to.
_KEYS_OF_SOME: dict[str, frozenset[str]] = {
    "beta": frozenset(get_args(PreferenceLoss)) - {"slic", "orpo"},
    "label_smoothing": frozenset({"conservative_dpo", "robust_dpo"}),
    "target_margin": frozenset({"simpo", "slic"}),
    "odds_coefficient": frozenset({"orpo"}),
}


class PreferenceConfig(LearningConfig):
    """A policy learns from preferences with no reward model in between: DPO and its kin."""

    name: PreferenceLoss
    beta: PositiveFloat = Field(
        0.1, description="Scale of the implicit reward: how strongly the policy is held to where it started. SimPO "
        "wants about 2; slic and orpo have none."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="conservative_dpo, robust_dpo: share of labels taken to be wrong."
    )
    target_margin: float = Field(
        1.0, ge=0, description="simpo: margin of the reward that is asked for; slic: of the log-probs, in nats."
    )
    odds_coefficient: PositiveFloat = Field(0.1, description="orpo: weight of the odds-ratio term beside the NLL.")
    nll_coefficient: float = Field(
        0.0, ge=0, description="Weight of the chosen response's mean NLL added to the loss; orpo always has it, at 1."
    )

    @model_validator(mode="after")
    def _keys_belong(self) -> PreferenceConfig:
        for key, losses in _KEYS_OF_SOME.items():
            if key in self.model_fields_set and self.name not in losses and self._changed(key):
                raise ValueError(f"{key} belongs to {', '.join(sorted(losses))}, not to {self.name}; leave it out")
        if self.name in _KEYS_OF_SOME["label_smoothing"] and not self.label_smoothing:
            raise ValueError(f"{self.name} needs label_smoothing above 0; with 0 it is dpo")
        if self.name == "orpo" and self.nll_coefficient:
            raise ValueError("orpo has its NLL term already, at weight 1; leave nll_coefficient out")
        return self

    def _changed(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model that training started from."""
        return self.name in NEEDS_REFERENCE


class FeedbackConfig(LearningConfig):
    """A policy learns from responses that are good or bad each for itself: KTO."""

    name: Literal["kto"] = "kto"
    beta: PositiveFloat = Field(
        0.1, description="Scale of the implicit reward: how strongly the policy is held to the reference."
    )
    desirable_weight: PositiveFloat = Field(
        1.0, description="Weight of a good response. Where the two kinds are not as many, weight times number is to be "
        "between 1 and 4/3 times that of the bad."
    )
    undesirable_weight: PositiveFloat = Field(1.0, description="Weight of a bad response.")

    @property
    def needs_reference(self) -> bool:
        """Always."""
        return True
