"""The policy's turns within samples: positions by hand and against a slow loop, and turns that cannot be."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest
import torch

from experience.schema import ROLLOUT, SchemaError, make_batch
from experience.table import join
from experience.turns import Turns, one_turn_each


def episodes(seed: int, num_rows: int) -> list[list[tuple[int, int]]]:
    """Of each row the begin and end of its turns."""
    source = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        turns, at = [], 0
        for _ in range(source.randint(1, 4)):
            start = at + source.randint(1, 3)
            at = start + source.randint(1, 5)
            turns.append((start, at))
        rows.append(turns)
    return rows


def batch(rows: list[list[tuple[int, int]]], first_id: int = 0, **changes: Any) -> pa.RecordBatch:
    drawn = [sum(end - start for start, end in turns) for turns in rows]
    ids = list(range(first_id, first_id + len(rows)))
    columns = {
        "sample_id": ids,
        "prompt_id": ids,
        "tokens": [list(range(turns[-1][1])) for turns in rows],
        "num_prompt_tokens": [turns[0][0] for turns in rows],
        "turn_starts": [[start for start, _ in turns] for turns in rows],
        "turn_ends": [[end for _, end in turns] for turns in rows],
        "environment_rewards": [[float(place) for place in range(length)] for length in drawn],
        "rollout_logprobs": [[-1.0] * length for length in drawn],
        "policy_versions": [[0] * length for length in drawn],
        "finish_reason": ["stop"] * len(rows),
    }
    return make_batch(ROLLOUT, columns | changes)


def test_positions_against_a_slow_loop() -> None:
    rows = episodes(0, 9)
    turns = Turns.of_rollouts([batch(rows[:4]), batch(rows[4:], 4)])
    order = [7, 0, 4, 3]
    offsets, wanted, ends = [0], [], [0]
    for row in order:
        for start, end in rows[row]:
            wanted += [offsets[-1] + token - 1 for token in range(start, end)]
        offsets.append(offsets[-1] + rows[row][-1][1])
        ends.append(len(wanted))
    positions, found = turns.positions(order, torch.tensor(offsets))
    assert positions.tolist() == wanted and found.tolist() == ends
    lengths = [sum(end - start for start, end in row) for row in rows]
    assert turns.lengths_N.tolist() == lengths
    assert turns.turn_offsets.diff().tolist() == [end - start for row in rows for start, end in row]


def test_one_turn_is_the_response() -> None:
    columns = one_turn_each([2, 1], [5, 4])
    given = Turns.of_rollouts(pa.record_batch(columns))
    single = Turns.single(torch.tensor([2, 1]), torch.tensor([5, 4]))
    for turns in (given, single):
        positions, ends = turns.positions([1, 0], torch.tensor([0, 4, 9]))
        assert positions.tolist() == [0, 1, 2, 5, 6, 7] and ends.tolist() == [0, 3, 6]
    assert columns["environment_rewards"].to_pylist() == [[], []]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"turn_starts": [[1, 3]]}, "sample 0 has 6 tokens, 1 of them prompt, and a turn from 3 to 6"),
        ({"turn_starts": [[2, 4]]}, "a turn from 2 to 3"),
        ({"turn_ends": [[3, 5]]}, "a turn from 4 to 5"),
        ({"turn_starts": [[1]]}, "turn_starts and turn_ends differ in number"),
        ({"environment_rewards": [[1.0]]}, "environment_rewards of sample 0 has 1 values for a response of 4 tokens"),
        ({"policy_versions": [[0, 0, 0]]}, "policy_versions of sample 0 has 3 values for a response of 4 tokens"),
    ],
)
def test_turns_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    rows = [[(1, 3), (4, 6)]]
    assert join([batch(rows)]).num_rows == 1
    with pytest.raises(SchemaError, match=message):
        join([batch(rows, **changes)])


def test_turns_outside_their_sample() -> None:
    turns = Turns.of_rollouts(batch([[(1, 3), (4, 6)]]))
    with pytest.raises(ValueError, match="row 0 of the pack has 5 tokens and a turn from 4 to 6, after one that ends"):
        turns.positions([0], torch.tensor([0, 5]))
