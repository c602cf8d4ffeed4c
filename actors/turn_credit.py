"""What an environment gave for turns: as one score a sample, and where in the sample it was earned.

Legend: N samples, U turns of all of them, T tokens of all turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from algorithms.packed import sample_sums, spread
from experience.schema import ROLLOUT, SCORES, check_schema, make_batch
from experience.tensors import list_column, scalar_column
from experience.turns import Turns


def environment_scores(rollouts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """SCORES of the rollouts' rows: the sum of each sample's turn rewards."""
    for rollout in rollouts:
        check_schema(rollout, ROLLOUT)
    rewards = list_column(rollouts, "turn_rewards")
    scores_N = sample_sums(rewards.values.double(), rewards.offsets)
    ids = scalar_column(rollouts, "sample_id")
    return make_batch(SCORES, {"sample_id": ids.tolist(), "score": scores_N.float().tolist()})


def moved_to_turns(table: pa.Table, offsets: Tensor, weights_N: Tensor) -> Tensor:
    """What to add to rewards (T,) so that each turn's reward stands on that turn's last token.

    All of the score stands on the sample's last token before that; the sum over a sample stays what it is.

    Args:
        table: joined rollouts; where they have no turn rewards nothing moves.
        offsets: (N+1,), where samples begin and end among the T tokens.
        weights_N: by how much the environment's reward counts in each sample's score (``Totals.weights``).
    """
    rewards = list_column(table, "turn_rewards")
    moved_T = torch.zeros(int(offsets[-1]), dtype=torch.float64)
    if not len(rewards.values):
        return moved_T
    rewards_U = rewards.values.double() * spread(weights_N, rewards.offsets)
    ends_U = Turns.of_rollouts(table).turn_offsets[1:]
    moved_T = moved_T.index_add(0, ends_U - 1, rewards_U)
    return moved_T.index_add(0, offsets[1:] - 1, -sample_sums(rewards_U, rewards.offsets))
