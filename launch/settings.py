"""Settings of the run itself and of the online driver. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.evaluation import RESPONSE_METRICS, SCORE, EvaluationRules
from actors.rewards.config import CheckerRewardConfig, CodeRewardConfig, FunctionRewardConfig
from cluster.config import FrozenConfig, PositiveInt
from data.config import DataConfig, SourceConfig


class RunSettings(FrozenConfig):
    """The run itself: its name, its length, what it keeps."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run's folder.")
    root: str = Field(
        "runs", description="Folder of all runs. On several nodes: one that all of them see. Relative paths, here and "
        "of models and data, start at $TROUPE_HOME, or else at the current folder; ~ is the home folder."
    )
    seed: int = Field(0, ge=0, description="Seeds data order, sampling and initial weights.")
    num_iterations: PositiveInt | None = Field(
        None, description="PPO: batches of experience to train on (required). Supervised: updates, where fewer than "
        "num_epochs give."
    )
    checkpoint_every: PositiveInt | None = Field(
        None, description="Iterations (or updates) between checkpoints; none: at the end and when stopped."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints kept.")
    keep_experience: bool = Field(False, description="Keep each iteration's experience as an Arrow file.")
    log_every: PositiveInt = Field(1, description="Iterations (or updates) between lines of progress.")


class NormaliseSettings(FrozenConfig):
    """Normalising a reward model after training."""

    by: Literal["demonstrations", "policy_samples"] = Field(
        description="`demonstrations`: mean 0 on good responses (InstructGPT). `policy_samples`: mean 0 and standard "
        "deviation 1 on responses that the policy drew (Ziegler 2019)."
    )
    data: tuple[SourceConfig, ...] = Field(
        (), description="Those responses, in a format of demonstrations. None: the chosen responses of `data.train`; "
        "`policy_samples` needs some."
    )
    max_rows: PositiveInt = Field(10_000, description="Of them, the first so many are measured.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: object) -> object:
        """`normalise: demonstrations`, and paths that stand for sources."""
        if isinstance(values, str):
            return {"by": values}
        if isinstance(values, dict) and isinstance(data := values.get("data", ()), str | dict | list):
            items = data if isinstance(data, list) else [data]
            return {**values, "data": [{"path": item} if isinstance(item, str) else item for item in items]}
        return values

    @model_validator(mode="after")
    def _has_samples(self) -> NormaliseSettings:
        if self.by == "policy_samples" and not self.data:
            raise ValueError("policy_samples needs data: responses that the policy drew, with their prompts")
        return self

    def data_config(self, run: DataConfig) -> DataConfig:
        """What to read, as the run's data are read."""
        return run.model_copy(update={"train": self.data, "heldout": (), "heldout_fraction": 0.0})


class OnlineSettings(FrozenConfig):
    """How experience flows from the engines to the trainers."""

    batch_size: PositiveInt = Field(description="Samples per training iteration.")
    max_staleness: int = Field(
        0, ge=0, description="Policy versions that generation may run ahead of training: 0 is on-policy PPO."
    )
    max_redraws: int = Field(
        0, ge=0, description="Dynamic sampling (DAPO): a prompt whose responses all have the same score is dropped and "
        "another drawn in its place, at most so many times a place; the last one stays. 0: none is dropped."
    )
    max_failed_redraws: PositiveInt = Field(
        8, description="A prompt whose samples could not be scored is dropped, and another drawn in its place, at most "
        "so many times a place; then the run ends: the reward is down."
    )
    scoring_batch_size: PositiveInt = Field(
        64, description="Samples that are scored together as soon as that many are generated."
    )


def checker_role(name: str) -> str:
    """The role of an evaluation's checker."""
    return f"evaluation-{name}"


class BestBySettings(FrozenConfig):
    """By what an iteration's weights are the best so far."""

    metric: str = Field(
        "score", description="A metric of the evaluation without its `evaluation/`: score, pass_at_1, "
        "CHECKER/pass_at_1 and so on."
    )
    mode: Literal["max", "min"] = Field("max", description="Whether more is better, or less.")

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far; the earlier of two that are equal stays."""
        return best is None or (value > best if self.mode == "max" else value < best)


class EvaluationSettings(FrozenConfig):
    """Answering held-out prompts while an online run trains, apart from what it trains on."""

    every: PositiveInt | None = Field(
        None, description="Iterations between evaluations; besides, one is before the first and one after the last."
    )
    num_prompts: PositiveInt = Field(
        256, description="Held-out prompts that are answered, the same each time: the first so many, or all."
    )
    samples_per_prompt: PositiveInt = Field(
        1, description="Responses to each. They are drawn with seeds of their own, the same each time."
    )
    temperature: float | None = Field(
        None, ge=0, description="Softmax temperature; 0 takes the most probable response. None: that of the rollouts."
    )
    threshold: float | None = Field(
        None, description="A response whose score is at least this passes. None: no pass@k of the run's own rewards."
    )
    ks: tuple[PositiveInt, ...] = Field(
        (), description="Numbers of samples for pass@k and best-of-n. None: 1, 2, 4 and so on, and samples_per_prompt."
    )
    checkers: dict[
        str, Annotated[CheckerRewardConfig | CodeRewardConfig | FunctionRewardConfig, Field(discriminator="kind")]
    ] = Field(
        {}, description="Further scores, by names of your own, that nothing is trained on: of the kinds checker, code "
        "and function. Each is a role of its own; its metrics are `evaluation/NAME/...`."
    )
    checker_threshold: float = Field(1.0, description="A response that a checker gives at least this passes.")
    best_by: BestBySettings | None = Field(
        None, description="Keep the checkpoint of the best evaluation besides the newest ones, and export its model as "
        "`best/`. None: none is kept for that."
    )
    keep_samples: bool = Field(
        True, description="Keep the responses with their scores, as text, in `evaluation/iteration_NNNNNN.arrow`."
    )

    @model_validator(mode="after")
    def _can_be_counted(self) -> EvaluationSettings:
        number = self.samples_per_prompt
        if self.temperature == 0 and number > 1:
            raise ValueError(f"temperature 0 gives one response to a prompt, and samples_per_prompt is {number}: 1")
        if (most := max(self.ks, default=1)) > number:
            raise ValueError(f"ks: {most} of samples_per_prompt = {number} cannot be chosen: at most {number}")
        return self

    @property
    def rules(self) -> EvaluationRules:
        """What is computed of each column of scores."""
        ks = {2**power for power in range(self.samples_per_prompt.bit_length())} | {self.samples_per_prompt}
        own = {} if self.threshold is None else {SCORE: self.threshold}
        return EvaluationRules(self.ks or tuple(sorted(ks)), own | dict.fromkeys(self.checkers, self.checker_threshold))

    def metric_names(self, rewards: Sequence[str]) -> tuple[str, ...]:
        """Every metric that an evaluation has, where the run's rewards have these names (none: it has but one)."""
        columns = (SCORE, *rewards, *self.checkers)
        return (*(name for column in columns for name in self.rules.metric_names(column)), *RESPONSE_METRICS)
