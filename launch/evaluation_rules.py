"""Rules between the evaluation of an online run and the rest of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from actors.config import RolloutConfig
from actors.rewards.config import AnyReward
from data.config import DataConfig
from launch.errors import Problem
from launch.reward_rules import NAME, OTHER_NAMES, UNNAMED, by_role, columns_of, reward_names
from launch.settings import EvaluationSettings


def evaluation_has_prompts(data: DataConfig, evaluation: EvaluationSettings | None) -> Iterator[Problem]:
    """There are prompts to evaluate on."""
    if evaluation is not None and not data.heldout and not data.heldout_fraction:
        yield Problem("evaluation", "there is nothing to evaluate on", "give data.heldout or data.heldout_fraction")


def checkers_are_named(
    reward: AnyReward | None, rewards: dict[str, AnyReward], evaluation: EvaluationSettings | None
) -> Iterator[Problem]:
    """A checker's name is its own: metrics and columns are called by it."""
    taken = OTHER_NAMES | by_role(reward, rewards).keys() | {"score", "prompt", "response"}
    for name in evaluation.checkers if evaluation is not None else ():
        if name in taken or not NAME.fullmatch(name):
            right = "small letters, digits and _, and no name of a reward, another role or a column"
            yield Problem(f"evaluation.checkers.{name}", f"{name!r} cannot be the name of a checker", right)


def checked_columns_are_kept(data: DataConfig, evaluation: EvaluationSettings | None) -> Iterator[Problem]:
    """Columns of the prompts' rows that checkers ask for are kept."""
    for name, checker in (evaluation.checkers if evaluation is not None else {}).items():
        for column in sorted(columns_of(checker) - set(data.keep_columns)):
            kept = ", ".join((*data.keep_columns, column))
            what = f"needs the column {column!r} of the prompts' rows"
            yield Problem(f"evaluation.checkers.{name}", what, f"data.keep_columns: [{kept}]")


def best_is_measured(
    reward: AnyReward | None,
    rewards: dict[str, AnyReward],
    rollout: RolloutConfig,
    evaluation: EvaluationSettings | None,
) -> Iterator[Problem]:
    """What the best checkpoint is looked for by is measured."""
    if evaluation is None or (by := evaluation.best_by) is None:
        return
    names = evaluation.metric_names([name for name in reward_names(reward, rewards, rollout) if name != UNNAMED])
    if by.metric not in names:
        more = "" if evaluation.threshold is not None else "; pass_at_1 needs evaluation.threshold"
        yield Problem("evaluation.best_by.metric", f"{by.metric} is not measured", f"one of {', '.join(names)}{more}")


EVALUATION_RULES = (evaluation_has_prompts, checkers_are_named, checked_columns_are_kept, best_is_measured)
