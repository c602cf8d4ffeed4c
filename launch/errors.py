"""What can go wrong between a user's command and a running job: one tree, every message written for the user.

Each message says what is wrong, where, and what would be right. ``exit_code`` is what the command line ends with:
2 where nothing was started, 1 where a run was under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LaunchError(Exception):
    """Base of this package's errors."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration: ``where: what; right``."""

    where: str
    what: str
    right: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.right}" if self.right else text


class RuleViolations(ValueError):
    """Cross-field rules that a configuration breaks, all of them. ``where`` of each problem is a dotted key."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class ConfigError(LaunchError):
    """A configuration that cannot be run, with every problem that was found in it."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))


class RunDirError(LaunchError):
    """A run's folder is there when it must not be, is not there when it must be, or cannot be written."""


class CheckpointError(LaunchError):
    """A checkpoint cannot be written or read."""

    exit_code = 1


class DataChanged(LaunchError):
    """Files of data were not the same when they were read again."""

    exit_code = 1


class RewardsDown(LaunchError):
    """Prompt after prompt in the same place of a batch could not be scored."""

    exit_code = 1
