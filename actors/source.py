"""The source role: draws rows for the others. Holds no model and imports no torch of its own."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from actors.config import ModelConfig
from actors.evaluation import EvaluationRules, evaluate, samples_table
from cluster.context import RankContext
from data.build import Counts
from data.config import DataConfig
from data.dataset import Dataset, Drawn
from data.formats import Kind
from data.order import Cursor
from data.tokenizer import load_tokenizer
from experience.table import open_table, write_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchInfo:
    """What the driver knows of a batch.

    ``num_rows`` counts prompts, sequences, labelled responses or comparisons, and ``ids`` are theirs; ``lengths`` are
    in tokens, one for each row of the record batch, of which a comparison has one a response. ``next_cursor`` is what
    the next draw starts from.
    """

    num_rows: int
    num_tokens: int
    ids: tuple[int, ...]
    lengths: tuple[int, ...]
    next_cursor: str


@dataclass(frozen=True)
class SourceDescription:
    """What there is to draw from.

    ``num_rows`` is one epoch, ``num_rows_in_all`` every row once, held-out ones too. ``num_sequences`` and
    ``num_heldout_sequences`` count rows of record batches: responses where the data are comparisons. ``longest`` is of
    one of them, ``longest_row`` of a comparison's together, both in tokens; ``most_responses`` is of one comparison.
    ``num_heldout_bytes`` is the UTF-8 text that the ``num_heldout_learnt`` tokens of held-out examples stand for (see
    ``bits_per_byte``). ``fingerprint`` changes with what a cursor means, ``digest`` with what an id means.
    """

    kind: Kind
    num_rows: int
    num_heldout_rows: int
    num_rows_in_all: int
    num_sequences: int
    num_heldout_sequences: int
    num_tokens: int
    longest: int
    longest_row: int
    most_responses: int
    num_heldout_learnt: int
    num_heldout_bytes: int
    counts: tuple[Counts, ...]
    fingerprint: str
    digest: str
    first_cursor: str

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A held-out loss in bits a byte of text, which is the same figure whatever the tokenizer.

        EOS and other marks cost bits and are no text. Not a number where there is no held-out text.

        Example: 1.386 nats a token (2 bits) at 4 bytes a token are 0.5 bits a byte.
        """
        if not self.num_heldout_bytes:
            return math.nan
        return nats_per_token * self.num_heldout_learnt / self.num_heldout_bytes / math.log(2)


class SourceActor:
    """The data of a run, tokenised when it starts.

    Args:
        context: the rank it is; there is one.
        data: the sources and what to make of them.
        kind: ``prompts``, ``examples``, ``comparisons`` or ``feedback``.
        model: whose tokenizer is used.
        seed: of the order.
        whole_document: pre-training: every row is a document, learnt whole.
        keep_ties: keep comparisons of tied responses that have a ``preference``.

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
        keep_ties: bool = False,
    ) -> None:
        started = time.monotonic()
        self._tokenizer = load_tokenizer(model.tokenizer_path, trust_remote_code=model.trust_remote_code)
        self._data = Dataset.from_config(
            data, kind, self._tokenizer, seed=seed, whole_document=whole_document, keep_ties=keep_ties
        )
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
        train, heldout = data.train_facts, data.heldout_facts
        learns = data.kind == "examples"
        return SourceDescription(
            kind=data.kind,
            num_rows=data.num_rows,
            num_heldout_rows=data.num_heldout_rows,
            num_rows_in_all=len(data),
            num_sequences=train.num_rows,
            num_heldout_sequences=heldout.num_rows,
            num_tokens=data.num_tokens,
            longest=data.longest,
            longest_row=data.longest_row,
            most_responses=max(train.most_rows, heldout.most_rows),
            num_heldout_learnt=heldout.num_learnt_tokens if learns else 0,
            num_heldout_bytes=round(heldout.num_learnt_bytes) if learns else 0,
            counts=data.counts,
            fingerprint=data.fingerprint(),
            digest=data.digest(),
            first_cursor=Cursor().to_json(),
        )

    def next_batch(self, cursor: str, num_rows: int) -> tuple[pa.RecordBatch, BatchInfo]:
        """The next rows of the endless order. Pure: the same cursor gives the same batch.

        Returns:
            a batch of schema prompts, examples, comparisons (rows of one together, best first) or feedback, and what
            it holds.

        Raises:
            DataError: ``cursor`` is not one.
        """
        return _with_info(self._data.draw(Cursor.from_json(cursor), num_rows))

    def heldout(self, start: int = 0, num_rows: int | None = None) -> tuple[pa.RecordBatch, BatchInfo]:
        """Held-out rows in file order: all, or ``num_rows`` from ``start``; empty where there are none (left)."""
        return _with_info(self._data.heldout(start, num_rows))

    def in_order(self, start: int = 0, num_rows: int | None = None) -> tuple[pa.RecordBatch, BatchInfo]:
        """Every row once, by place: those to train on, then those held out; all, or ``num_rows`` from ``start``."""
        return _with_info(self._data.in_order(start, num_rows))

    def chosen(self, num_rows: int) -> tuple[pa.RecordBatch, BatchInfo]:
        """The best responses of the first comparisons to train on, at most ``num_rows`` comparisons."""
        batch, info = _with_info(self._data.in_order(0, min(num_rows, self._data.train_facts.num_units)))
        best = pc.equal(batch.column("rank"), 0)
        return batch.filter(best), info

    def examples_of(self, data: DataConfig, num_rows: int) -> tuple[pa.RecordBatch, BatchInfo]:
        """The first rows of other data, as examples.

        Raises:
            DataError: they cannot be used as configured.
        """
        return _with_info(Dataset.first_rows(data, "examples", self._tokenizer, num_rows).in_order(0, num_rows))

    def evaluate(
        self,
        rollouts: Sequence[pa.RecordBatch],
        scores: Sequence[pa.RecordBatch],
        columns: Mapping[str, int],
        rules: EvaluationRules,
        facts: Mapping[str, str | int | float],
        keep_at: Path | None,
    ) -> dict[str, float]:
        """The metrics of responses to held-out prompts (``actors.evaluation.evaluate``).

        Args:
            scores: the batches of all columns of scores, one column after the other.
            columns: how many of them each column has, by its name and in their order.
            facts: about the whole, kept in the file.
            keep_at: where the responses are written, as text; none: nowhere.

        Raises:
            SchemaError: a column is not of the rollouts' rows.
            OSError: the file cannot be written.
        """
        batches = iter(scores)
        by_name = {name: [next(batches) for _ in range(number)] for name, number in columns.items()}
        metrics = evaluate(rollouts, by_name, rules)
        if keep_at is not None:
            keep_at.parent.mkdir(parents=True, exist_ok=True)
            write_table(samples_table(rollouts, by_name, self._tokenizer, facts), keep_at)
        return metrics

    def keep(self, columns: Sequence[pa.RecordBatch], path: Path) -> None:
        """Write a column of another role, in its parts, into one Arrow file, which is there as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(pa.Table.from_batches(columns), path)

    def kept(self, path: Path) -> tuple[pa.RecordBatch, int]:
        """What ``keep`` wrote, as one batch, and its rows.

        Raises:
            OSError: it cannot be read.
        """
        table = open_table(path).combine_chunks()
        (batch,) = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
        return batch, batch.num_rows


def _with_info(drawn: Drawn) -> tuple[pa.RecordBatch, BatchInfo]:
    info = BatchInfo(
        num_rows=len(drawn.ids),
        num_tokens=int(drawn.lengths.sum()),
        ids=tuple(drawn.ids.tolist()),
        lengths=tuple(drawn.lengths.tolist()),
        next_cursor=drawn.next_cursor.to_json(),
    )
    return drawn.batch, info
