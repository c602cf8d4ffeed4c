"""Configuration of the algorithms. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from algorithms.errors import AlgorithmError
from algorithms.needs import BUILT_IN, Needs, needs_of

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KLConfig(_Frozen):
    """The penalty that keeps the policy close to the reference, token by token."""

    coefficient: float = Field(
        0.05, ge=0, description="Weight of the KL penalty (the first one, where adaptive). 0 needs no reference. GRPO: "
        "0.04; Dr. GRPO: 0."
    )
    placement: Literal["reward", "loss"] = Field(
        "reward", description="Part of the reward, as a number (InstructGPT), or a term of the loss, with a gradient "
        "(GRPO and its kin; REINFORCE++ with baseline)."
    )
    estimator: Literal["k1", "k2", "k3"] | None = Field(
        None, description="How a token's KL is estimated; none: k1 in the reward, k3 in the loss (REINFORCE++ with "
        "baseline: k2 there). In the loss k1 is a number whose gradient is k2's: its own is 0 in expectation."
    )
    target: PositiveFloat | None = Field(
        None, description="Adaptive controller (Ziegler 2019): KL per sample, summed over tokens, in nats, that the "
        "coefficient is steered to; none keeps the coefficient fixed."
    )
    horizon_samples: PositiveInt = Field(
        10_000, description="With target: samples over which the coefficient moves. Above a fifth of a batch."
    )

    @property
    def estimator_used(self) -> Literal["k1", "k2", "k3"]:
        """The estimator, where none is named too."""
        return self.estimator or ("k1" if self.placement == "reward" else "k3")

    @property
    def in_loss(self) -> bool:
        """Whether the loss has a term of it."""
        return self.placement == "loss" and self.coefficient > 0


class CorrectionConfig(_Frozen):
    """Weights for tokens that were drawn by other arithmetic, or older weights, than those in training.

    k is exp(log-prob by the policy's ranks before training - log-prob by the engine as it drew the token).
    """

    method: Literal["none", "truncated", "masked", "sequence_masked", "decoupled"] = Field(
        "none",
        description="`truncated`: min(k, cap) (TIS). `masked`: k, or 0 outside of low to high (IcePop). "
        "`sequence_masked`: min(k, cap), or 0 where the sample's geometric mean of k is outside (Geo-RS-Token-TIS). "
        "`decoupled`: k, or 0 above cap (AReaL). All of them recompute log-probs, which the ratio is then against.",
    )
    cap: PositiveFloat = Field(
        2.0, description="truncated, decoupled, sequence_masked: the largest k (AReaL: 5)."
    )
    low: float | None = Field(
        None, ge=0, description="masked, sequence_masked: the smallest k, or geometric mean of k, that counts. None: "
        "0.5 (IcePop); sequence_masked: 0.999 (verl)."
    )
    high: PositiveFloat | None = Field(
        None, description="masked, sequence_masked: the largest. None: 5 (IcePop); sequence_masked: 1.001 (verl), made "
        "for long responses and weights of the same version: short or stale ones need bounds further apart."
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest k, or geometric mean of k, that counts."""
        low, high = (0.999, 1.001) if self.method == "sequence_masked" else (0.5, 5.0)
        return low if self.low is None else self.low, high if self.high is None else self.high

    @model_validator(mode="after")
    def _bounds_belong(self) -> CorrectionConfig:
        of = {
            "cap": ["truncated", "decoupled", "sequence_masked"],
            "low": (bounded := ["masked", "sequence_masked"]),
            "high": bounded,
        }
        for key, methods in of.items():
            if self.method not in methods and getattr(self, key) != type(self).model_fields[key].default:
                names = f"{', '.join(methods[:-1])} and {methods[-1]}"
                raise ValueError(f"{key} belongs to {names}, not to {self.method}; leave it out")
        low, high = self.bounds
        for key, bound, side in (("low", max(low, 1), "above"), ("high", min(high, 1), "below")):
            if bound != 1:
                raise ValueError(f"{key} {bound:g} is {side} 1, which k is where nothing is to be corrected")
        if not low < high:
            raise ValueError(f"low {low:g} is not below high {high:g}")
        return self


class PretrainingMixConfig(_Frozen):
    """PPO-ptx: text of `pretraining_data` that is learnt in the same updates (InstructGPT).

    An update's loss is that of the policy, a mean over response tokens as `normalise` says, plus coefficient times the
    mean nats of a pre-training token.
    """

    coefficient: PositiveFloat = Field(
        27.8, description="Weight of the mean nats of a pre-training token. InstructGPT's, of a normalisation that its "
        "paper does not state: a place to start from."
    )
    examples_per_sample: PositiveInt = Field(8, description="Pre-training sequences for each sample of an update.")


PolicyLossName = Literal["clip", "dual_clip", "gspo", "gspo_token", "cispo", "reinforce"]


class OnlineConfig(_Frozen):
    """How a policy learns from scores of its own responses: PPO, GRPO and their kin."""

    name: str = Field(
        "ppo",
        description=f"{', '.join(f'`{name}`' for name in BUILT_IN)}, or your own as `my_module:MY_ALGORITHM`.",
    )
    kl: KLConfig = Field(KLConfig(), description="The penalty towards the reference.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    whiten_rewards: bool = Field(
        False, description="Scale rewards to unit variance over the tokens of the global batch (mean kept)."
    )
    whiten_advantages: bool = Field(
        False, description="Mean 0, std 1 over the tokens of the global batch. PPO: true."
    )
    policy_loss: PolicyLossName = Field(
        "clip",
        description="`clip`: PPO's; `dual_clip`: bounded for negative advantages too; `gspo`, `gspo_token`: the ratio "
        "of a whole sequence; `cispo`: the clipped ratio as a weight; `reinforce`: no ratio.",
    )
    clip_ratio: PositiveFloat | None = Field(
        None, description="The policy ratio is clipped to 1 -+ this; none: 0.2, and the paper's 3e-4 and 4e-4 for gspo."
    )
    clip_low: PositiveFloat | None = Field(None, description="The lower distance, where it is another.")
    clip_high: PositiveFloat | None = Field(None, description="The upper distance, where it is another (DAPO: 0.28).")
    clip_dual: float = Field(3.0, gt=1, description="dual_clip: the largest ratio of a negative advantage.")
    normalise: Literal["tokens", "sequences", "constant"] = Field(
        "tokens",
        description="The loss is a mean over the minibatch's tokens; over its samples' means (GRPO); or a sum over "
        "tokens divided by samples times the longest response (Dr. GRPO).",
    )
    mask_truncated: bool = Field(
        False, description="Responses that did not end by themselves carry no policy loss (DAPO's overlong filter)."
    )
    clip_value: PositiveFloat | None = Field(0.2, description="New values stay within this of the old; none: no clip.")
    entropy_coefficient: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    num_epochs: PositiveInt = Field(1, description="Passes over each batch of experience.")
    num_minibatches: PositiveInt = Field(1, description="Optimizer updates per pass.")
    recompute_logprobs: bool = Field(
        False, description="Divide by log-probs that the policy's ranks recompute before training, instead of the "
        "engine's own (advised in bfloat16, where the two differ by about 0.02 nats). A correction implies it, and "
        "where online.max_staleness is above 0 it needs one."
    )
    correction: CorrectionConfig = Field(CorrectionConfig(), description="Weights against engine and age.")
    critic_warmup_iterations: int = Field(
        0, ge=0, description="First iterations that train the critic alone. The policy's learning-rate schedule, and "
        "the steering of the KL coefficient, begin behind them."
    )
    pretraining: PretrainingMixConfig = Field(
        PretrainingMixConfig(), description="The mixture with `pretraining_data`, where that is given."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, given: Any) -> Any:
        name = given.get("name", "ppo") if isinstance(given, dict) else None
        if not isinstance(name, str):
            return given
        try:
            defaults = needs_of(name).defaults
        except AlgorithmError:
            return given  # the validator of the name will say so
        return _merged(_of_its_placement(defaults, given), given)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        needs_of(name)
        return name

    @model_validator(mode="after")
    def _keys_belong(self) -> OnlineConfig:
        for key in sorted(self.needs.unread_keys):
            if self._changed(key):
                raise ValueError(f"{key} means nothing to {self.name}; leave it out")
        if self.policy_loss != "dual_clip" and self._changed("clip_dual"):
            raise ValueError(f"clip_dual belongs to policy_loss dual_clip, not to {self.policy_loss}; leave it out")
        if self.policy_loss == "reinforce" and any((self.clip_ratio, self.clip_low, self.clip_high)):
            raise ValueError("policy_loss reinforce has no ratio to clip; leave clip_ratio, clip_low, clip_high out")
        if self.policy_loss == "cispo" and not (self.clip_ratio or self.clip_high):
            raise ValueError("policy_loss cispo needs clip_high, which its paper tunes and gives no number for; say 4")
        return self

    def _changed(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def needs(self) -> Needs:
        """Roles and samples that the algorithm needs."""
        return needs_of(self.name)

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether the policy's ranks score the samples before they are trained on."""
        return self.recompute_logprobs or self.correction.method != "none"

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may be."""
        low, high = {"gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4), "cispo": (1.0, 0.2)}.get(
            self.policy_loss, (0.2, 0.2)
        )
        return self.clip_low or self.clip_ratio or low, self.clip_high or self.clip_ratio or high


def _of_its_placement(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """``defaults`` without their KL estimator where the KL is placed elsewhere: it is a default of their placement."""
    kl, own = defaults.get("kl", {}), _said(given.get("kl"))
    its = kl.get("placement", KLConfig.model_fields["placement"].default)
    if "estimator" not in kl or not isinstance(own, dict) or own.get("placement", its) == its:
        return defaults
    return {**defaults, "kl": {key: value for key, value in kl.items() if key != "estimator"}}


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over ``defaults``, section by section."""
    merged = {**defaults, **given}
    for key, default in defaults.items():
        own = _said(given.get(key, {}))
        if isinstance(default, Mapping) and isinstance(own, dict):
            merged[key] = _merged(default, own)
    return merged


def _said(section: object) -> object:
    """What was said of a section, without the defaults that it was filled up with."""
    return section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section


class LearningConfig(_Frozen):
    """What all ways of learning from a data set have."""

    name: str
    num_epochs: PositiveFloat = Field(
        1.0, description="Passes over the training data; may be a fraction. No row is learnt beyond them: the last "
        "update takes the rows that are left, perhaps fewer than batch_size."
    )
    batch_size: PositiveInt = Field(
        description="Rows (sequences, comparisons, or judged responses) per optimizer update, all ranks."
    )
    evaluate_every: PositiveInt | None = Field(None, description="Updates between evaluations; none: only at the end.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Evaluations without improvement after which training stops; none: never. Where it is set, "
        "the best checkpoint is kept and its model exported, too."
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
#: Of a mean over tokens, where the others scale a sum over them.
SIMPO_BETA = 2.0
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
        0.1, description="Scale of the implicit reward: how strongly the policy is held to where it started. simpo, "
        "whose reward is a mean over tokens and not a sum, has 2.0 by default (its paper: 2 to 10); slic and orpo have "
        "none."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="conservative_dpo, robust_dpo: share of labels taken to be wrong."
    )
    target_margin: float = Field(
        1.0, ge=0, description="simpo: margin of the reward that is asked for, its paper's gamma (half of beta is a "
        "good start); slic: of the log-probs, in nats."
    )
    odds_coefficient: PositiveFloat = Field(0.1, description="orpo: weight of the odds-ratio term beside the NLL.")
    nll_coefficient: float = Field(
        0.0, ge=0, description="Weight of the chosen response's mean NLL added to the loss; orpo always has it, at 1."
    )

    @model_validator(mode="before")
    @classmethod
    def _scale_of_simpo(cls, given: Any) -> Any:
        is_simpo = isinstance(given, Mapping) and given.get("name") == "simpo"
        return {"beta": SIMPO_BETA, **given} if is_simpo else given

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
