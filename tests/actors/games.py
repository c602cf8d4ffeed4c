"""Environments for tests."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np

from actors.environments.face import Action, Environment, Step, Task, Words


class Echo(Environment):
    """Begins with the seed's last digit, answers with the length of a turn, and pays by its number, from 1 on.

    What it has been told is kept in ``log``, of all episodes.
    """

    log: list[Action] = []  # noqa: RUF012  of the class: episodes are made where tests do not see them

    def __init__(self, num_turns: int = 3, words: str = "[{}]") -> None:
        self.num_turns, self.words, self.turn = num_turns, words, 0

    async def reset(self, task: Task) -> Words:
        self.seed, self.prompt_id = task.seed, task.columns.get("id")
        return [2 + self.seed % 10] if self.words else ""

    async def step(self, action: Action) -> Step:
        self.log.append(action)
        self.turn += 1
        await asyncio.sleep(0)
        return Step(self.words.format(len(action.tokens)), float(self.turn), self.turn == self.num_turns)


class Faulty(Echo):
    """Goes wrong in the second turn of prompt 1, as it is told."""

    def __init__(self, how: str, everywhere: bool = False) -> None:
        super().__init__()
        self.how, self.everywhere = how, everywhere

    async def reset(self, task: Task) -> Words:
        words = await super().reset(task)
        if self.prompt_id == 1 and self.how == "opened with nothing":
            return None  # type: ignore[return-value]
        return words

    async def step(self, action: Action) -> Step:
        step = await super().step(action)
        if self.turn != 2 or (self.prompt_id != 1 and not self.everywhere):
            return step
        match self.how:
            case "raised":
                raise KeyError("gone")
            case "timed out":
                await asyncio.sleep(60)
            case "said nothing":
                return Step("", 0.0, False)
            case "said what is no token":
                return Step([64], 0.0, False)
            case "gave no finite number":
                return Step("x", float("nan"), False)
            case "gave no step":
                return "a word"  # type: ignore[return-value]
            case "was cancelled":
                raise asyncio.CancelledError
            case _:
                return self.unreadable(step)
        return step

    def unreadable(self, step: Step) -> Step:
        """A step with something in it that is of another type, or too large."""
        wrong: dict[str, Any] = {
            "words of None": {"words": None},
            "words in bytes": {"words": b"ab"},
            "half a character": {"words": "\ud800"},
            "a number as words": {"words": 7},
            "no reward": {"reward": None},
            "a reward beyond float32": {"reward": 1e39},
            "text as a reward": {"reward": "10"},
            "a token without a reward": {"reward": [1.0, None]},
            "a token's reward without end": {"reward": np.array([1.0, np.inf])},
            "many rewards": {"reward": np.zeros(3)},
            "many ends": {"done": np.zeros(2)},
        }
        return replace(step, **wrong.get(self.how, {}))


class Asking(Echo):
    """Reads a column."""

    needs_columns = ("id", "answer")


class Unfinished(Environment):
    """Lacks a method."""

    async def reset(self, task: Task) -> Words:
        return ""


class Blocking(Echo):
    """Answers without being awaited."""

    def step(self, action: Action) -> Step:  # type: ignore[override]
        return Step("", 0.0, True)


class Unclosed(Echo):
    """Cannot end."""

    async def close(self) -> None:
        raise ValueError("not closed")


class Counting(Echo):
    """Pays the first token of a turn 0, the next 1, and so on."""

    async def step(self, action: Action) -> Step:
        return replace(await super().step(action), reward=[float(place) for place in range(len(action.tokens))])


class Generous(Echo):
    """Pays what float32 holds, and with the second turn more than that."""

    async def step(self, action: Action) -> Step:
        return replace(await super().step(action), reward=2e38)
