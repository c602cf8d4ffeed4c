"""Settings of the run itself and of the online driver. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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
    scoring_batch_size: PositiveInt = Field(
        64, description="Samples that are scored together as soon as that many are generated."
    )
    max_failed_redraws: PositiveInt = Field(
        8, description="A prompt whose samples could not be scored is dropped, and another drawn in its place, at most "
        "so many times a place; then the run ends: the reward is down."
    )
