"""A reward model from K-wise comparisons: all K responses of a prompt in one element, against every pair by itself.

Both learn the same pairs with the same weight: K (K - 1) / 2 of each prompt. As one element each response goes through
the model once; as pairs it goes through K - 1 times. What is to be expected is a cost of 1 / (K - 1).

    python -m benchmarks.ranking [--size small] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import torch

from actors.config import TrainedRoleConfig, ZeroConfig
from actors.learner import LearnerActor
from algorithms.config import RewardModelConfig
from benchmarks.measure import Trial, print_setting
from benchmarks.tiny import sequences, write_model
from benchmarks.training import PACK, common, context
from experience.schema import COMPARISONS, make_batch

PROMPTS, PROMPT, SHORTEST, LONGEST = 8, 16, 24, 56


def comparisons(elements: Sequence[Sequence[list[int]]]) -> pa.RecordBatch:
    """A batch of comparisons, the responses of each given best first."""
    rows = [(number, rank, row) for number, element in enumerate(elements) for rank, row in enumerate(element)]
    return make_batch(
        COMPARISONS,
        {
            "comparison_id": [number for number, _, _ in rows],
            "sequence_id": list(range(len(rows))),
            "rank": [rank for _, rank, _ in rows],
            "tokens": [row for _, _, row in rows],
            "num_prompt_tokens": [PROMPT] * len(rows),
            "margin": [0.0] * len(rows),
            "preference": [1.0] * len(rows),
            "rating": [""] * len(rows),
        },
    )


def race(folder: Path, size: str, num_responses: int, rounds: int) -> None:
    """Time one update on the same pairs both ways."""
    rows = sequences(PROMPTS * num_responses, SHORTEST, LONGEST, size)
    whole = [rows[first : first + num_responses] for first in range(0, len(rows), num_responses)]
    pairs = [pair for element in whole for pair in combinations(element, 2)]
    config = TrainedRoleConfig(**common(folder, ZeroConfig(stage=0)))
    role = LearnerActor(context("learner"), config, RewardModelConfig(batch_size=PROMPTS), 0)
    ways = {f"one element of K = {num_responses}": comparisons(whole), "its pairs, one by one": comparisons(pairs)}
    trial = Trial("pairs", len(pairs))
    for batch in ways.values():
        role.train(0, 1000, batch)
    for _ in range(rounds):
        for way, batch in ways.items():
            with trial.time(way):
                role.train(0, 1000, batch)
    trial.report("its pairs, one by one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--responses", type=int, nargs="+", default=[2, 4, 6, 9], help="K, one after the other")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        num_weights = write_model(Path(folder), given.size, num_labels=1)
        print_setting(
            "a reward model from K-wise comparisons against their pairs",
            {
                "model": f"{num_weights / 1e6:.1f} M weights, float32, {torch.get_num_threads()} thread",
                "update": f"{PROMPTS} prompts of {PROMPT} tokens, K responses each, {SHORTEST} to {LONGEST} tokens in "
                f"all, packs of at most {PACK}",
            },
        )
        for num_responses in given.responses:
            race(Path(folder), given.size, num_responses, given.rounds)


if __name__ == "__main__":
    main()
