"""Data and untrained models of the two example environments.

Demonstrations are whole episodes as text, by players that know the rules and play badly: half of the sums are answered
at random instead of by calling the calculator, and every other guess forgets what was said about the ones before.

Usage::

    python -m examples.environments.data --out runs/environments
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.demo_data import write_json_lines
from examples.untrained import write_untrained

LARGEST_SUMMAND = 30
LARGEST_GUESS = 15
MAX_GUESSES = 4
WORDS = ("sum", ":", "call", "result", "answer", ";", "guess", "higher", "lower")

Row = dict[str, str]


def sums(rng: random.Random) -> Iterator[Row]:
    """One sum after another, and how somebody answered it."""
    while True:
        first, second = (rng.randint(1, LARGEST_SUMMAND) for _ in range(2))
        if rng.random() < 0.5:
            told = f" call {first} {second} ; result {first + second} answer {first + second} ;"
        else:
            told = f" answer {rng.randint(2, 2 * LARGEST_SUMMAND)} ;"
        yield {"prompt": f"sum {first} {second} :", "completion": told}


def guesses(rng: random.Random) -> Iterator[Row]:
    """One game after another, as somebody played it."""
    while True:
        hidden, low, high, told = rng.randint(1, LARGEST_GUESS), 1, LARGEST_GUESS, ""
        for _ in range(MAX_GUESSES):
            guess = rng.randint(low, high) if rng.random() < 0.5 else rng.randint(1, LARGEST_GUESS)
            told += f" {guess} ;"
            if guess == hidden:
                break
            told += " higher" if guess < hidden else " lower"
            low, high = (max(low, guess + 1), high) if guess < hidden else (low, min(high, guess - 1))
        yield {"prompt": "guess :", "completion": told}


def write(out: Path, seed: int) -> None:
    """Demonstrations and prompts of both, and the model that both begin with."""
    games: dict[str, tuple[Callable[[random.Random], Iterator[Row]], int]] = {
        "calculator": (sums, 12_000), "guessing": (guesses, 8_000),
    }  # fmt: skip
    for name, (play, num_rows) in games.items():
        played = play(random.Random(f"{name} {seed}"))
        out.joinpath(name).mkdir(parents=True, exist_ok=True)
        write_json_lines(out / name / "sft.jsonl", (next(played) for _ in range(num_rows)))
        write_json_lines(out / name / "prompts.jsonl", ({"prompt": next(played)["prompt"]} for _ in range(4_000)))
    write_untrained(out / "base", [*WORDS, *(str(number) for number in range(2 * LARGEST_SUMMAND + 1))])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the data and the untrained model of the example environments.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
