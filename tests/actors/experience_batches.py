"""Batches of experience with random tokens, and slow ways to score them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from experience.schema import COMPARISONS, CREDIT_WITH_RETURNS, EXAMPLES, ROLLOUT, VALUES, make_batch
from experience.turns import one_turn_each


def rollout(num_rows: int, seed: int = 0, first_id: int = 0, longest: int = 20) -> pa.RecordBatch:
    """Samples of 2 to 8 prompt tokens and 1 or more response tokens."""
    source = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, 9, (num_rows,), generator=source).tolist()
    responses = torch.randint(1, longest - 8, (num_rows,), generator=source).tolist()
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    tokens = [torch.randint(2, 64, (length,), generator=source).tolist() for length in lengths]
    return make_batch(
        ROLLOUT,
        {
            "sample_id": list(range(first_id, first_id + num_rows)),
            "prompt_id": list(range(first_id, first_id + num_rows)),
            "tokens": tokens,
            "num_prompt_tokens": prompts,
            **one_turn_each(prompts, lengths),
            "rollout_logprobs": [[-1.0] * r for r in responses],
            "policy_versions": [[0] * r for r in responses],
            "finish_reason": ["stop"] * num_rows,
        },
    )


def credit(rollouts: list[pa.RecordBatch], logprobs: list[list[float]], seed: int = 1) -> pa.RecordBatch:
    """Random advantages and returns, with these log-probs to divide by."""
    source = torch.Generator().manual_seed(seed)
    return make_batch(
        CREDIT_WITH_RETURNS,
        {
            "sample_id": [i for batch in rollouts for i in batch.column("sample_id").to_pylist()],
            "advantages": [torch.randn(len(row), generator=source).tolist() for row in logprobs],
            "returns": [torch.randn(len(row), generator=source).tolist() for row in logprobs],
            "behaviour_logprobs": logprobs,
            "loss_weights": [[1.0] * len(row) for row in logprobs],
        },
    )


def values(rollouts: list[pa.RecordBatch], rows: list[list[float]]) -> pa.RecordBatch:
    ids = [i for batch in rollouts for i in batch.column("sample_id").to_pylist()]
    return make_batch(VALUES, {"sample_id": ids, "values": rows})


def examples(num_rows: int, seed: int = 0) -> pa.RecordBatch:
    """Sequences of 3 to 20 tokens; the second half of each is to be learnt."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (num_rows,), generator=source).tolist()
    return make_batch(
        EXAMPLES,
        {
            "example_id": list(range(num_rows)),
            "tokens": [torch.randint(2, 64, (n,), generator=source).tolist() for n in lengths],
            "loss_mask": [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths],
        },
    )


def comparisons(num_pairs: int, seed: int = 0) -> pa.RecordBatch:
    """Pairs whose chosen side ends in token 7 and whose rejected side ends in token 9."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 15, (2 * num_pairs,), generator=source).tolist()
    ends = [7, 9] * num_pairs
    return make_batch(
        COMPARISONS,
        {
            "comparison_id": [row // 2 for row in range(2 * num_pairs)],
            "sequence_id": list(range(2 * num_pairs)),
            "rank": [0, 1] * num_pairs,
            "num_prompt_tokens": [1] * (2 * num_pairs),
            "margin": [0.0] * (2 * num_pairs),
            "preference": [1.0] * (2 * num_pairs),
            "rating": [""] * (2 * num_pairs),
            "tokens": [
                [*torch.randint(10, 64, (n,), generator=source).tolist(), end]
                for n, end in zip(lengths, ends, strict=True)
            ],
        },
    )


def rows_of(batches: list[pa.RecordBatch], name: str) -> list[Any]:
    """A column's rows over several batches."""
    return [row for batch in batches for row in batch.column(name).to_pylist()]
