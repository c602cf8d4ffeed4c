"""What a checkpoint keeps of samples that are ready for training."""

from __future__ import annotations

import pytest

from experience.buffer import BufferState, ChunkState
from launch.buffered import Scored, buffered_prompts, complete_iterations


def chunk(iteration: int, *prompt_ids: int) -> ChunkState:
    return ChunkState(
        iteration=iteration,
        prompt_ids=list(prompt_ids),
        num_rows=2 * len(prompt_ids),
        num_tokens=9,
        oldest_version=3,
        newest_version=3,
    )


@pytest.mark.parametrize(
    ("chunks", "kept"),
    [
        ([], set()),
        ([chunk(3, 6), chunk(3, 7)], {6, 7}),
        ([chunk(3, 6)], set()),
        ([chunk(3, 6, 7), chunk(4, 8)], {6, 7}),
        ([chunk(3, 6, 7), chunk(4, 9), chunk(4, 8)], {6, 7, 8, 9}),
        ([chunk(3, 7), chunk(4, 8, 9)], set()),
        ([chunk(4, 8, 9)], set()),
    ],
    ids=["nothing", "one whole", "one in part", "one and a part", "two", "a part and one", "a gap"],
)
def test_whole_iterations_are_kept_without_a_gap(chunks: list[ChunkState], kept: set[int]) -> None:
    state = BufferState(version=3, batch_rows=4, chunks=chunks)
    payloads = [Scored(number, [], [], {}, []) for number in range(len(chunks))]
    whole, of_it = complete_iterations(state, payloads)
    assert buffered_prompts(whole) == kept
    assert [chunks[payload.rollout] for payload in of_it] == whole["chunks"]
