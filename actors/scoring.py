"""How a scoring role goes over a batch: its own rows, in packs, back into row order as a column.

Legend: T tokens of a pack, S response tokens of a pack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.packed import ResponsePack, Samples, in_row_order, scoring_packs
from actors.reports import ColumnInfo
from cluster.context import RankContext
from experience.schema import ROLLOUT, check_schema, make_batch
from experience.tensors import PackedRows, list_array


class Forward(Protocol):
    """Whatever runs forward: an engine in training, or one that only scores."""

    def forward(
        self, micro_batches: Sequence[ResponsePack], function: Callable[[nn.Module, ResponsePack], Tensor]
    ) -> list[Tensor]:
        """``function`` of each micro-batch, without gradients."""
        ...


def score_responses(
    engine: Forward,
    function: Callable[[nn.Module, ResponsePack], Tensor],
    rollouts: Sequence[pa.RecordBatch],
    *,
    context: RankContext,
    device: torch.device,
    collective: bool,
    max_tokens: int,
    schema: pa.Schema,
) -> tuple[pa.RecordBatch, ColumnInfo]:
    """A per-token column over the responses of this rank's rows of ``rollouts``.

    Args:
        function: gives a model and a pack one number for each response token, (S,).
        schema: of the column: ``sample_id`` and one list of float32.

    Raises:
        ValueError: a sample is longer than ``max_tokens``.
    """
    started = time.perf_counter()
    for rollout in rollouts:
        check_schema(rollout, ROLLOUT)
    samples = Samples(rollouts)
    own, rows = scoring_packs(samples.lengths, context.rank, context.num_ranks, max_tokens, collective)
    packs = [samples.pack(part, device) for part in rows]
    values = [value.float().cpu() for value in engine.forward(packs, function)]
    pieces = in_row_order(rows, values, [pack.offsets for pack in packs])
    lengths = torch.tensor([samples.response_lengths[row] for row in own], dtype=torch.int64)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    flat = torch.cat(pieces) if pieces else torch.zeros(0)
    column = make_batch(
        schema,
        {"sample_id": own_ids(rollouts, own), schema.names[1]: list_array(flat, offsets)},
    )
    num_tokens = sum(samples.lengths[row] for row in own)
    return column, ColumnInfo(len(own), num_tokens, time.perf_counter() - started)


def last_scores(model: nn.Module, packed: PackedRows) -> Tensor:
    """Score (N,) of each row of a pack at its last token, by a ``TokenScorer``."""
    return torch.as_tensor(model(packed.tokens, packed.position_ids, packed.offsets[1:] - 1))


def own_ids(rollouts: Sequence[pa.RecordBatch], own: range) -> pa.Array:
    """The ``sample_id`` of a run of rows."""
    ids = pa.chunked_array([rollout.column("sample_id") for rollout in rollouts], pa.int64())
    return ids.slice(own.start, len(own)).combine_chunks()
