"""Two environments: a calculator that the policy may call, and a game in which it guesses a number.

Every word is one token of the tokenizer that `examples.environments.data` writes. A turn ends with the stop string `;`.
"""

from __future__ import annotations

import random

from actors.environments.face import Action, Environment, Step, Task, Words


class Calculator(Environment):
    """The prompt asks `sum A B :`. `call A B ;` is answered with `result C`, and `answer C ;` ends the episode.

    The right answer earns 1. A call costs ``call_cost``; what is neither ends the episode and earns nothing.
    """

    def __init__(self, call_cost: float = 0.05) -> None:
        self._call_cost = call_cost

    async def reset(self, task: Task) -> Words:
        _, first, second, _ = task.prompt.split()
        self._right = int(first) + int(second)
        return ""

    async def step(self, action: Action) -> Step:
        match action.text.split():
            case ["call", first, second, ";"] if first.isdigit() and second.isdigit():
                return Step(f"result {int(first) + int(second)}", -self._call_cost, False)
            case ["answer", answer, ";"] if answer.isdigit():
                return Step("", float(int(answer) == self._right), True)
            case _:
                return Step("", 0.0, True)


class Guessing(Environment):
    """The policy guesses a number from 1 to ``largest``, a guess a turn, and is told `higher` or `lower`.

    Guessing it earns 1, and ends the episode; so does what is no guess, which earns nothing.
    """

    def __init__(self, largest: int = 15) -> None:
        self._largest = largest

    async def reset(self, task: Task) -> Words:
        self._hidden = random.Random(task.seed).randint(1, self._largest)
        return ""

    async def step(self, action: Action) -> Step:
        match action.text.split():
            case [guess, ";"] if guess.isdigit():
                if int(guess) == self._hidden:
                    return Step("", 1.0, True)
                return Step("higher" if int(guess) < self._hidden else "lower", 0.0, False)
            case _:
                return Step("", 0.0, True)
