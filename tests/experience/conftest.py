"""Rollouts of made-up samples, with the columns that roles add."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from experience.schema import REF_LOGPROBS, ROLLOUT, SCORES, make_batch
from experience.turns import one_turn_each

MakeBatch = Callable[[range], pa.RecordBatch]


def response_length(sample: int) -> int:
    return sample % 4


@pytest.fixture
def rollout_of() -> MakeBatch:
    """Rollout rows of the given sample ids: 2 samples a prompt, 3 prompt tokens, 0 to 3 response tokens."""

    def make(samples: range) -> pa.RecordBatch:
        return make_batch(
            ROLLOUT,
            {
                "sample_id": list(samples),
                "prompt_id": [sample // 2 for sample in samples],
                "tokens": [[sample] * (3 + response_length(sample)) for sample in samples],
                "num_prompt_tokens": [3] * len(samples),
                **one_turn_each([3] * len(samples), [3 + response_length(sample) for sample in samples]),
                "rollout_logprobs": [[-0.5] * response_length(sample) for sample in samples],
                "policy_versions": [[1] * response_length(sample) for sample in samples],
                "finish_reason": ["stop" if response_length(sample) < 3 else "length" for sample in samples],
            },
        )

    return make


@pytest.fixture
def ref_of() -> MakeBatch:
    """Reference log-probs of these samples: the sample's id, negated, on each token."""

    def make(samples: range) -> pa.RecordBatch:
        logprobs = [[-float(sample)] * response_length(sample) for sample in samples]
        return make_batch(REF_LOGPROBS, {"sample_id": list(samples), "ref_logprobs": logprobs})

    return make


@pytest.fixture
def scores_of() -> MakeBatch:
    """Scores of these samples: a tenth of the sample's id."""

    def make(samples: range) -> pa.RecordBatch:
        return make_batch(SCORES, {"sample_id": list(samples), "score": [sample / 10 for sample in samples]})

    return make
