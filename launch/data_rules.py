"""The rules between what a learner does and what its data turn out to hold. Imports no torch.

``launch.rules`` knows the configuration alone. Here is what shows only once rows are read: ``troupe check`` asks it of
the first rows, a run of all rows, before it trains on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from algorithms.config import PreferenceConfig, RewardModelConfig
from data.build import Counts
from launch.config import LearnerRunConfig
from launch.errors import ConfigError, Problem

if TYPE_CHECKING:
    from actors.source import SourceDescription


def keeps_ties(config: LearnerRunConfig) -> bool:
    """Whether the loss learns from a comparison of which no response is better."""
    return isinstance(config.algorithm, RewardModelConfig) and config.algorithm.loss == "soft_labels"


def row_problems(
    config: LearnerRunConfig, where: str, *, longest_row: int, most_responses: int
) -> Iterator[Problem]:
    """Whether the learner takes the largest of the rows at ``where``.

    Args:
        longest_row: in tokens; of a comparison, those of all its responses.
        most_responses: of one comparison.
    """
    budget = config.learner.max_tokens_per_pack
    if longest_row > budget:
        what = f"a comparison of {longest_row}" if most_responses > 1 else f"a sequence of {longest_row}"
        yield Problem(
            "learner.max_tokens_per_pack",
            f"{budget} is less than {where} needs, which has {what} tokens",
            f"at least {longest_row}",
        )
    if most_responses > 2 and (taker := _taker_of_pairs(config)) is not None:
        yield Problem(
            where,
            f"has a row of {most_responses} responses, and {taker} takes rows of two",
            "leave out or cut such rows, or train a reward model with algorithm.loss ranking or best_of",
        )


def _taker_of_pairs(config: LearnerRunConfig) -> str | None:
    if isinstance(config.algorithm, PreferenceConfig):
        return config.algorithm.name
    return "algorithm.loss soft_labels" if keeps_ties(config) else None


def label_problems(config: LearnerRunConfig, where: str, counts: Counts) -> Iterator[Problem]:
    """Whether the rows of the source at ``where`` have the column that is learnt from."""
    if keeps_ties(config) and not counts.num_preferences:
        yield Problem(
            where,
            f"none of its {counts.train + counts.heldout} rows has a `preference`, which soft_labels learns from",
            "name the column, as `columns: {preference: p_first}` in the source, or set algorithm.loss to ranking",
        )


def require_usable(config: LearnerRunConfig, data: SourceDescription) -> None:
    """Refuse data that would end the run as soon as a certain row is drawn, or that miss what is learnt from.

    Raises:
        ConfigError: naming every problem.
    """
    largest = {"longest_row": data.longest_row, "most_responses": data.most_responses}
    problems = list(row_problems(config, "data", **largest))
    for counts in data.counts:
        problems.extend(label_problems(config, counts.path, counts))
    if problems:
        raise ConfigError(f"run {config.run.name}", problems)
