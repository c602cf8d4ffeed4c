"""The face of an environment: what a policy acts upon, turn by turn, within one sample.

Invariants:

- There is one object for one episode, so it may keep its state in itself; many of them run in one event loop.
- What an environment says is a text, which is tokenised once and by itself, or tokens. What the policy said stays the
  tokens that were sampled: ``Action.text`` is for reading, and is never tokenised again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
#: A text, or tokens of the policy's vocabulary.
Words: TypeAlias = str | Sequence[int]


@dataclass(frozen=True)
class Task:
    """What an episode begins with.

    ``columns`` are the other columns of the prompt's row, those that ``data.keep_columns`` names. ``seed`` is the same
    for all samples of a prompt, so that they play the same game, and the same when a run is repeated.
    """

    prompt: str
    prompt_tokens: Sequence[int]
    columns: Mapping[str, JSON]
    seed: int


@dataclass(frozen=True)
class Action:
    """A turn of the policy. ``text`` is that of its tokens, without a closing EOS.

    ``finished`` says that it ended by EOS or a stop string and was not cut off.
    """

    tokens: Sequence[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class Step:
    """What came of a turn: the environment's words, its reward, and whether the episode is over.

    ``reward`` is one number for the turn, which its last token earns, or one for each of the action's tokens.

    Words of the last step are never read.
    """

    words: Words
    reward: float | Sequence[float]
    done: bool


class Environment(ABC):
    """One episode. A subclass is made anew for each, with ``rollout.environment.options`` as its keywords.

    ``needs_columns`` names what it reads from ``Task.columns``: a run whose rows do not keep them is refused.
    """

    needs_columns: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    async def reset(self, task: Task) -> Words:
        """Begin. What is returned stands behind the prompt, before the policy's first turn; it may be empty."""

    @abstractmethod
    async def step(self, action: Action) -> Step:
        """Answer a turn. Unless the episode is over there must be words: the policy goes on after them."""

    async def close(self) -> None:  # noqa: B027  most have nothing to end
        """End what the episode started. Called once, however it ended."""
