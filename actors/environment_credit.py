"""What an environment gave for the policy's tokens: as one score a sample, and where in the sample it was earned.

Legend: N samples, T tokens of all their turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from algorithms.packed import sample_sums, spread
from experience.schema import ROLLOUT, SCORES, check_schema, make_batch
from experience.tensors import list_column, scalar_column


def environment_scores(rollouts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """SCORES of the rollouts' rows: the sum of what the environment gave in each sample."""
    for rollout in rollouts:
        check_schema(rollout, ROLLOUT)
    rewards = list_column(rollouts, "environment_rewards")
    scores_N = sample_sums(rewards.values.double(), rewards.offsets)
    ids = scalar_column(rollouts, "sample_id")
    return make_batch(SCORES, {"sample_id": ids.tolist(), "score": scores_N.float().tolist()})


def moved_to_tokens(table: pa.Table, offsets: Tensor, weights_N: Tensor) -> Tensor:
    """What to add to rewards (T,) so that each of the environment's stands on the token that earned it.

    All of the score stands on the sample's last token before that; the sum over a sample stays what it is.

    Args:
        table: joined rollouts; where they have no rewards of an environment nothing moves.
        offsets: (N+1,), where samples begin and end among the T tokens.
        weights_N: by how much the environment's reward counts in each sample's score (``Totals.weights``).
    """
    rewards = list_column(table, "environment_rewards")
    if not len(rewards.values):
        return torch.zeros(int(offsets[-1]), dtype=torch.float64)
    rewards_T = rewards.values.double() * spread(weights_N, offsets)
    return rewards_T.index_add(0, offsets[1:] - 1, -sample_sums(rewards_T, offsets))
