"""The source role: draws rows for the others. Holds no model and imports no torch of its own."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import pyarrow as pa

from actors.config import ModelConfig
from cluster.context import RankContext
from data.build import Counts
from data.config import DataConfig
from data.dataset import Dataset, Drawn
from data.formats import Kind
from data.order import Cursor
from data.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchInfo:
    """What the driver knows of a batch.

    ``num_rows`` counts prompts, sequences or comparisons, and ``ids`` are theirs; ``lengths`` are in tokens, one for
    each row of the record batch, of which a comparison has two. ``next_cursor`` is what the next draw starts from.
    """

    num_rows: int
    num_tokens: int
    ids: tuple[int, ...]
    lengths: tuple[int, ...]
    next_cursor: str


@dataclass(frozen=True)
class SourceDescription:
    """What there is to draw from. ``num_rows`` is one epoch; ``fingerprint`` changes with what a cursor means."""

    kind: Kind
    num_rows: int
    num_heldout_rows: int
    num_tokens: int
    longest: int
    counts: tuple[Counts, ...]
    fingerprint: str
    first_cursor: str


class SourceActor:
    """The data of a run, tokenised when it starts.

    Args:
        context: the rank it is; there is one.
        data: the sources and what to make of them.
        kind: ``prompts``, ``examples`` or ``comparisons``.
        model: whose tokenizer is used.
        seed: of the order.
        whole_document: pre-training: every row is a document, learnt whole.

    Raises:
        DataError: the data or the tokenizer cannot be used as configured.
    """

    def __init__(
        self,
        context: RankContext,
        data: DataConfig,
        kind: Kind,
        model: ModelConfig,
        seed: int,
        whole_document: bool = False,
    ) -> None:
        started = time.monotonic()
        tokenizer = load_tokenizer(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
        self._data = Dataset.from_config(data, kind, tokenizer, seed=seed, whole_document=whole_document)
        logger.info(
            "%s rank %d: %d rows of %s an epoch, %d held out, %d tokens, read in %.1f s",
            context.role,
            context.rank,
            self._data.num_rows,
            kind,
            self._data.num_heldout_rows,
            self._data.num_tokens,
            time.monotonic() - started,
        )

    def describe(self) -> SourceDescription:
        """What there is to draw from, and where to start."""
        data = self._data
        return SourceDescription(
            kind=data.kind,
            num_rows=data.num_rows,
            num_heldout_rows=data.num_heldout_rows,
            num_tokens=data.num_tokens,
            longest=data.longest,
            counts=data.counts,
            fingerprint=data.fingerprint(),
            first_cursor=Cursor().to_json(),
        )

    def next_batch(self, cursor: str, num_rows: int) -> tuple[pa.RecordBatch, BatchInfo]:
        """The next rows of the endless order. Pure: the same cursor gives the same batch.

        Returns:
            a batch of schema prompts, examples or comparisons (two rows each, chosen first), and what it holds.

        Raises:
            DataError: ``cursor`` is not one.
        """
        return _with_info(self._data.draw(Cursor.from_json(cursor), num_rows))

    def heldout(self, start: int = 0, num_rows: int | None = None) -> tuple[pa.RecordBatch, BatchInfo]:
        """Held-out rows in file order: all, or ``num_rows`` from ``start``; empty where there are none (left)."""
        return _with_info(self._data.heldout(start, num_rows))


def _with_info(drawn: Drawn) -> tuple[pa.RecordBatch, BatchInfo]:
    info = BatchInfo(
        num_rows=len(drawn.ids),
        num_tokens=int(drawn.lengths.sum()),
        ids=tuple(drawn.ids.tolist()),
        lengths=tuple(drawn.lengths.tolist()),
        next_cursor=drawn.next_cursor.to_json(),
    )
    return drawn.batch, info
