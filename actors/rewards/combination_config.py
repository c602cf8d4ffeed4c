"""Configuration of how several rewards become one, and of what shapes it. Imports no torch.

``combine`` makes one score of the named rewards'; ``shaping: {NAME: {kind: ..., ...}}`` then changes it, in the order
that it is written in, each step logged under its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from cluster.config import FrozenConfig, PositiveFloat, PositiveInt

#: What is logged beside the rewards and the shapings.
RESERVED = frozenset({"combined", "whitened", "total", "total_std"})

NotNegative = Annotated[float, Field(ge=0)]


class LinearConfig(FrozenConfig):
    """A weighted sum."""

    kind: Literal["linear"] = Field("linear", description="A weighted sum.")
    weights: dict[str, float] = Field(
        {}, description="Weight of each reward, by name, for all of them or none; none weighs each 1."
    )

    def rewards(self) -> tuple[str, ...]:
        """The rewards that are named; none means all there are."""
        return tuple(self.weights)


class PiecewiseConfig(FrozenConfig):
    """Llama 2's rule: the safety score where the prompt is one of safety or the response seems unsafe."""

    kind: Literal["piecewise"] = Field("piecewise", description="Llama 2: safety where it matters, else helpfulness.")
    helpfulness: str = Field(description="Name of the reward for helpfulness: a logit.")
    safety: str = Field(description="Name of the reward for safety: a logit.")
    tag_column: str | None = Field(
        None,
        description="Column of the prompts' rows (data.keep_columns) that tags those of safety; none: there are none.",
    )
    tag_values: tuple[StrictBool | StrictInt | StrictFloat | StrictStr, ...] = Field(
        ("safety", True), description="What the column holds for a prompt of safety."
    )
    threshold: float = Field(
        0.15, gt=0, lt=1, description="A response is unsafe where its probability of being safe is below this."
    )
    whiten: bool = Field(True, description="Then mean 0 and variance 1 over the global batch, as Llama 2.")

    def rewards(self) -> tuple[str, ...]:
        """The rewards that are named."""
        return (self.helpfulness, self.safety)


class GatedConfig(FrozenConfig):
    """One reward counts where another is high enough."""

    kind: Literal["gated"] = Field("gated", description="One reward where another is high enough, else a fixed score.")
    score: str = Field(description="Name of the reward that counts.")
    gate: str = Field(description="Name of the reward that decides.")
    threshold: float = Field(description="The gate is open where its score is at least this.")
    replacement: float = Field(0.0, description="The score where it is closed.")

    def rewards(self) -> tuple[str, ...]:
        """The rewards that are named."""
        return (self.score, self.gate)


Combination = Annotated[LinearConfig | PiecewiseConfig | GatedConfig, Field(discriminator="kind")]


class _Transform(FrozenConfig):
    reward: str | None = Field(
        None, description="Which reward it changes, before they are combined; none: what they were combined to."
    )


class ClipConfig(_Transform):
    """Bounds."""

    kind: Literal["clip"] = Field("clip", description="Scores within bounds (DeepSpeed-Chat: -5 and 5).")
    low: float = Field(-5.0, description="Lower bound.")
    high: float = Field(5.0, description="Upper bound.")

    @model_validator(mode="after")
    def _rises(self) -> ClipConfig:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        return self


class NormaliseConfig(_Transform):
    """A scale."""

    kind: Literal["normalise"] = Field("normalise", description="(score - mean) / std.")
    by: Literal["constants", "running"] = Field(
        "constants",
        description="`constants`: mean and std below, measured once; `running`: of all scores of the run so far, this "
        "batch included.",
    )
    mean: float = Field(0.0, description="With constants.")
    std: PositiveFloat = Field(1.0, description="With constants.")

    @model_validator(mode="after")
    def _one_way(self) -> NormaliseConfig:
        if self.by == "running" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("mean and std are of `by: constants`; running ones are measured")
        return self


class LengthConfig(FrozenConfig):
    """A price of length."""

    kind: Literal["length"] = Field("length", description="A penalty for each token above a number.")
    penalty_per_token: NotNegative = Field(description="Subtracted for each.")
    free_tokens: int = Field(0, ge=0, description="So many cost nothing.")


class OverlongConfig(FrozenConfig):
    """DAPO's soft punishment of responses close to the longest."""

    kind: Literal["overlong"] = Field("overlong", description="DAPO: rises evenly over the last tokens.")
    margin_tokens: PositiveInt = Field(description="Over how many tokens before the longest response it rises.")
    max_tokens: PositiveInt | None = Field(None, description="The longest response; none: max_response_tokens.")
    penalty: PositiveFloat = Field(1.0, description="Subtracted from the longest response and beyond.")


class MissingEosConfig(FrozenConfig):
    """A price of not ending."""

    kind: Literal["missing_eos"] = Field("missing_eos", description="A penalty where a response did not end by itself.")
    penalty: NotNegative = Field(1.0, description="Subtracted then.")


class TruncationConfig(FrozenConfig):
    """A fixed score for not ending."""

    kind: Literal["truncation"] = Field("truncation", description="A fixed score where a response did not end.")
    score: float = Field(-1.0, description="What stands in the place of its score (Ziegler et al. 2019: -1).")


class RepetitionConfig(FrozenConfig):
    """A price of saying things again."""

    kind: Literal["repetition"] = Field("repetition", description="A penalty times the share of repeated n-grams.")
    ngram: PositiveInt = Field(4, description="Tokens of an n-gram.")
    penalty: NotNegative = Field(1.0, description="Subtracted from a response that is nothing but repetition.")


Shaping = Annotated[
    ClipConfig
    | NormaliseConfig
    | LengthConfig
    | OverlongConfig
    | MissingEosConfig
    | TruncationConfig
    | RepetitionConfig,
    Field(discriminator="kind"),
]


class TotalConfig(FrozenConfig):
    """From the scores of all rewards to one score a sample."""

    combine: Combination = Field(LinearConfig(), description="How the rewards become one.")
    shaping: dict[str, Shaping] = Field({}, description="What changes that then, by name, in this order.")

    def why_not(self, rewards: Iterable[str]) -> str | None:
        """What is wrong with this for a run that has these rewards; none where nothing is."""
        names = set(rewards)
        wanted = set(self.combine.rewards())
        wanted |= {one.reward for one in self.shaping.values() if isinstance(one, _Transform) and one.reward}
        if missing := sorted(wanted - names):
            return f"there is no reward {missing[0]!r}; the rewards are {', '.join(sorted(names))}"
        if isinstance(self.combine, LinearConfig) and self.combine.weights and names != set(self.combine.weights):
            without = ", ".join(sorted(names - set(self.combine.weights)))
            return f"combine.weights gives {without} no weight: give every reward one (0 only logs it), or none"
        if isinstance(self.combine, PiecewiseConfig | GatedConfig) and (unused := sorted(names - wanted)):
            return f"the reward {unused[0]!r} is not used by combine {self.combine.kind}"
        if reason := self._ignores_its_rewards():
            return reason
        if taken := sorted((names | set(self.shaping)) & RESERVED):
            return f"{taken[0]!r} cannot be the name of a reward or a shaping: it is logged as something else"
        if taken := sorted(names & set(self.shaping)):
            return f"{taken[0]!r} is the name of a reward and of a shaping: they are logged side by side"
        return None

    def _ignores_its_rewards(self) -> str | None:
        match self.combine:
            case PiecewiseConfig(helpfulness=first, safety=second) if first == second:
                return f"combine.helpfulness and safety are both {first!r}: the rule would choose between it and itself"
            case LinearConfig(weights=weights) if weights and not any(weights.values()):
                if all(isinstance(step, _Transform) for step in self.shaping.values()):
                    return "combine.weights: all weights are 0, so every response has the same score"
        return None

    @property
    def running(self) -> tuple[str, ...]:
        """The shapings that need moments over the run."""
        return tuple(
            name for name, one in self.shaping.items() if isinstance(one, NormaliseConfig) and one.by == "running"
        )
