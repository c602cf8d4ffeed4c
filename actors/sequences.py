"""Log-probs of whole responses, and the reference's pass over a data set of them.

Invariant: a response's log-prob is the sum over its tokens alone, at temperature 1, and does not depend on the
responses beside it in a pack.

Legend: N responses of a pack, S response tokens of a pack.
"""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.errors import RoleError
from actors.packed import ResponsePack, Samples, in_row_order, response_logprobs, scoring_packs
from actors.reports import ColumnInfo
from actors.scoring import Forward
from algorithms.preferences import sequence_logprobs
from cluster.context import RankContext
from experience.schema import (
    COMPARISONS,
    FEEDBACK,
    REF_FEEDBACK_LOGPROBS,
    REF_SEQUENCE_LOGPROBS,
    SchemaError,
    check_schema,
    make_batch,
    schema_name,
)

#: Of what ``score_sequences`` computes. To be raised with a change of it: log-probs that are kept are then not used.
SCORING_VERSION = 1
#: Whose log-probs the reference's columns are.
_COLUMNS = {"ref_logprob": "tokens", "mismatched_ref_logprob": "mismatched_tokens"}


def response_sums(model: nn.Module, pack: ResponsePack) -> Tensor:
    """Log-prob (N,) of each response of a pack, by a ``CausalLM``."""
    logprobs_S = response_logprobs(model, pack, 1.0)
    return sequence_logprobs(logprobs_S, pack.offsets.to(logprobs_S.device))


def score_sequences(
    engine: Forward,
    batch: pa.RecordBatch,
    *,
    context: RankContext,
    device: torch.device,
    collective: bool,
    max_tokens: int,
) -> tuple[pa.RecordBatch, ColumnInfo]:
    """The reference's column over this rank's rows of comparisons or feedback.

    Collective where ``collective``. Every rank gets the whole batch; their parts follow one another.

    Returns:
        a batch of schema REF_SEQUENCE_LOGPROBS or REF_FEEDBACK_LOGPROBS.

    Raises:
        SchemaError: the batch is neither.
        ValueError: a row is longer than ``max_tokens``.
    """
    started = time.perf_counter()
    judged = schema_name(batch.schema) == schema_name(FEEDBACK)
    check_schema(batch, FEEDBACK if judged else COMPARISONS)
    whole = Samples(batch)
    columns: dict[str, pa.Array] = {}
    num_tokens, own = 0, range(0)
    for name, column in _COLUMNS.items() if judged else [("ref_logprob", "tokens")]:
        samples = Samples(batch, column)
        own, rows = scoring_packs(
            samples.lengths, context.rank, context.num_ranks, max_tokens, collective, cut_by=whole.lengths
        )
        packs = [samples.pack(part, device) for part in rows]
        sums = [value.cpu() for value in engine.forward(packs, response_sums)]
        pieces = in_row_order(rows, sums, [torch.arange(len(part) + 1) for part in rows])
        flat = torch.cat(pieces).double() if pieces else torch.zeros(0, dtype=torch.float64)
        columns[name] = pa.array(flat.numpy())
        num_tokens += sum(samples.lengths[row] for row in own)
    columns["sequence_id"] = batch.column("sequence_id").slice(own.start, len(own))
    schema = REF_FEEDBACK_LOGPROBS if judged else REF_SEQUENCE_LOGPROBS
    return make_batch(schema, columns), ColumnInfo(len(own), num_tokens, time.perf_counter() - started)


class ReferenceLogprobs:
    """The reference's log-probs of the responses of the data, by ``sequence_id``.

    Args:
        path: a file of ``schema``.

    Raises:
        RoleError: the file is missing or damaged.
        SchemaError: it is of another schema, or ids are not 0, 1, 2 ...
    """

    def __init__(self, path: Path, schema: pa.Schema = REF_SEQUENCE_LOGPROBS) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise RoleError(f"the reference's log-probs cannot be read from {path}: {error}") from error
        check_schema(table, schema)
        ids = torch.from_numpy(table.column("sequence_id").to_numpy().copy())
        if not torch.equal(ids, torch.arange(len(ids))):
            raise SchemaError(f"{path}: sequence ids of the reference's log-probs are not 0, 1, 2 ... in order")
        self._values = {
            name: torch.from_numpy(table.column(name).to_numpy().copy()) for name in schema.names if name in _COLUMNS
        }

    def of(self, sequence_ids_N: Tensor, column: str = "ref_logprob") -> Tensor:
        """(N,) float64.

        Raises:
            SchemaError: a sequence has none.
        """
        values = self._values[column]
        if len(sequence_ids_N) and int(sequence_ids_N.max()) >= len(values):
            raise SchemaError(
                f"sequence {int(sequence_ids_N.max())} has no reference log-prob, there are {len(values)}; the "
                "data have changed since they were made"
            )
        return values[sequence_ids_N]
