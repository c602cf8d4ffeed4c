"""Make the data and the untrained model of the demo, whose task `examples.sorting` explains.

Held-out lists are kept apart by the *set* of their numbers: no list of the held-out files appears,
in any order, in any training file, the pre-training text included.

Files written
-------------
``pretrain.txt``              one plain-text document per line
``sft.jsonl``                 {"prompt", "completion"}
``sft_heldout.jsonl``         the same, held out
``preferences.jsonl``         {"prompt", "chosen", "rejected"}
``preferences_heldout.jsonl`` the same, held out
``rankings.jsonl``            {"prompt", "responses", "scores"}, four answers to each list
``rankings_heldout.jsonl``    the same, of the lists of ``preferences_heldout.jsonl``
``judgements.jsonl``          {"prompt", "responses", "scores", "preference", "rating"}, two answers to each list
``judgements_heldout.jsonl``  the same, of the lists of ``preferences_heldout.jsonl``
``tagged.jsonl``              {"prompt", "chosen", "rejected", "tag"}, judged for helpfulness or for safety
``tagged_heldout.jsonl``      the same, of the lists of ``preferences_heldout.jsonl``
``prompts.jsonl``             {"prompt", "answer"}, the prompts that PPO samples from; it is not told the answers
``heldout.jsonl``             {"prompt", "answer"}, for measuring the truth
``base/``                     configuration and tokenizer of the untrained model

A completion begins with a space and ends without an end-of-sequence token: whoever trains on it
appends that token.  The tokenizer knows one token per number and per word and ignores spaces, so
``tokenize(prompt) + tokenize(completion) == tokenize(prompt + completion)``.

Usage::

    python -m examples.demo_data --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.sorting import (
    LARGEST_NUMBER,
    WORDS,
    Labellers,
    ListSource,
    by_size,
    demonstration,
    join,
    judgement,
    make_prompt,
    preference,
    pretraining_document,
    ranking,
    tagged,
)
from examples.untrained import write_untrained


@dataclass(frozen=True)
class Sizes:
    """How many examples each file holds."""

    pretrain: int = 40_000
    sft: int = 4_000
    preferences: int = 12_000
    rankings: int = 600
    prompts: int = 8_000
    heldout: int = 500


def write_json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_data(directory: Path, seed: int, sizes: Sizes = Sizes()) -> None:
    """Write every data file of the demo; the same `seed` gives the same bytes."""
    labellers = Labellers()
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    source = ListSource(rng)

    # Held-out lists first, so that `source` keeps them out of everything after.
    heldout = [source.draw_heldout() for _ in range(sizes.heldout)]
    sft_heldout = [source.draw_heldout() for _ in range(sizes.heldout)]
    preferences_heldout = [source.draw_heldout() for _ in range(sizes.heldout)]

    write_json_lines(
        directory / "heldout.jsonl",
        ({"prompt": make_prompt(row), "answer": join(by_size(row))} for row in heldout),
    )
    write_json_lines(
        directory / "sft_heldout.jsonl",
        (demonstration(row, labellers, rng) for row in sft_heldout),
    )
    write_json_lines(
        directory / "preferences_heldout.jsonl",
        (preference(row, rng) for row in preferences_heldout),
    )

    with (directory / "pretrain.txt").open("w", encoding="utf-8") as file:
        for _ in range(sizes.pretrain):
            file.write(pretraining_document(source, rng) + "\n")
    write_json_lines(
        directory / "sft.jsonl",
        (demonstration(source.draw(), labellers, rng) for _ in range(sizes.sft)),
    )
    write_json_lines(
        directory / "preferences.jsonl",
        (preference(source.draw(), rng) for _ in range(sizes.preferences)),
    )
    write_json_lines(
        directory / "prompts.jsonl",
        (
            {"prompt": make_prompt(row), "answer": join(by_size(row))}
            for row in (source.draw() for _ in range(sizes.prompts))
        ),
    )

    # Each from a generator of its own, so that all other files are what they are without it.
    makers: dict[str, Callable[[Sequence[int], random.Random], dict[str, object]]] = {
        "rankings": ranking, "judgements": judgement, "tagged": tagged
    }
    for name, make in makers.items():
        own_rng = random.Random(f"{name} {seed}")
        own_source = source.beside(own_rng)
        write_json_lines(
            directory / f"{name}_heldout.jsonl",
            [make(row, own_rng) for row in preferences_heldout],
        )
        write_json_lines(
            directory / f"{name}.jsonl",
            [make(own_source.draw(), own_rng) for _ in range(sizes.rankings)],
        )


def write_base_model(directory: Path) -> None:
    """Write the configuration and the tokenizer of the untrained model."""
    write_untrained(directory, [*WORDS, *(str(number) for number in range(1, LARGEST_NUMBER + 1))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the data and the untrained model of the demo."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    arguments = parser.parse_args()
    write_data(arguments.out, arguments.seed)
    write_base_model(arguments.out / "base")


if __name__ == "__main__":
    main()
