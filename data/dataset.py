"""The data of a run: tokenised once, then drawn from batch by batch.

Invariants:

- What is drawn at a cursor depends on the data, the seed and the cursor alone, so a resumed run goes on as if it had
  not stopped. ``fingerprint`` tells whether the data are still the same.
- A row in terms of the configuration is a sequence, a prompt or a comparison. A comparison is two adjacent rows of a
  record batch, rank 0 (chosen) first.
- No token lives as a Python object beyond the batch it was tokenised in: 4 bytes a token are kept, 5 with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from data.build import Builder, Counts
from data.config import DataConfig
from data.errors import DataError, EmptyDataError
from data.formats import Kind
from data.order import Cursor, Int64s, Mixture, advance
from data.tokenize import TokenTable, join
from data.tokenizer import Tokenizer
from experience.schema import COMPARISONS, EXAMPLES, PROMPTS, make_batch


@dataclass(frozen=True)
class Drawn:
    """A batch, and what the driver needs to know of it.

    ``ids`` are of the rows in the configuration's terms (one a comparison); ``lengths`` of the batch's rows in
    tokens. ``next_cursor`` is where the next batch begins.
    """

    batch: pa.RecordBatch
    ids: Int64s
    lengths: Int64s
    next_cursor: Cursor


class Dataset:
    """Rows to train on, drawn in the mixture's order, and held-out rows in file order."""

    def __init__(
        self, kind: Kind, train: TokenTable, heldout: TokenTable, mixture: Mixture, counts: tuple[Counts, ...]
    ) -> None:
        self.kind: Kind = kind
        self.counts = counts
        self.mixture = mixture
        self._train = train
        self._heldout = heldout
        self._rows_each = 2 if kind == "comparisons" else 1
        self._order: tuple[int, Int64s] | None = None

    @classmethod
    def from_config(
        cls, config: DataConfig, kind: Kind, tokenizer: Tokenizer, *, seed: int, whole_document: bool = False
    ) -> Dataset:
        """Read, tokenise and split all sources.

        Args:
            config: the sources and what to make of them.
            kind: ``prompts`` (of any format the prompt part), ``examples`` or ``comparisons``.
            tokenizer: the model's own.
            seed: of the order.
            whole_document: pre-training: rows are documents, learnt whole and, as ``documents`` says, packed.

        Raises:
            DataError: a source cannot be read, is of no known format or empty, a row is refused, or the tokenizer
                lacks what the data need.
        """
        builder = Builder(config, kind, tokenizer, whole_document=whole_document)
        built = [builder.build(source, config.heldout_fraction) for source in config.train]
        extra = [builder.build(source, 0.0) for source in config.heldout]
        rows_each = 2 if kind == "comparisons" else 1
        for source in built:
            if not len(source.train):
                raise EmptyDataError(f"{source.counts}: nothing is left to train on")
        heldout = join([source.train for source in extra] or [source.heldout for source in built])
        if config.heldout_fraction and not len(heldout):
            counts = "; ".join(str(source.counts) for source in built)
            raise EmptyDataError(
                f"data.heldout_fraction {config.heldout_fraction} holds out nothing ({counts}): raise it, or give "
                "data.heldout"
            )
        weights = tuple(source.weight for source in config.train if source.weight is not None)
        mixture = Mixture(tuple(len(source.train) // rows_each for source in built), weights or None, seed)
        counts_of_all = tuple(source.counts for source in (*built, *extra))
        return cls(kind, join([source.train for source in built]), heldout, mixture, counts_of_all)

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return self.mixture.epoch_rows

    @property
    def num_heldout_rows(self) -> int:
        """Rows held out."""
        return len(self._heldout) // self._rows_each

    @property
    def num_tokens(self) -> int:
        """Tokens of all training rows, each counted once."""
        return self._train.num_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(np.diff(table.offsets).max(initial=0)) for table in (self._train, self._heldout))

    def fingerprint(self) -> str:
        """A digest of the tokens and of the mixture: equal exactly where a cursor means the same rows."""
        digest = xxhash.xxh3_128(repr(self.mixture).encode())
        for part in (self._train.offsets, self._train.values, self._train.mask):
            if part is not None:
                digest.update(part.data)
        return str(digest.hexdigest())

    def draw(self, cursor: Cursor, num_rows: int) -> Drawn:
        """The next ``num_rows`` rows; a batch may run on into the next epoch.

        Ids of prompts are serial numbers of the draw in the run, never used twice. Ids of examples and comparisons
        are their places in the data, the same in every epoch.

        Raises:
            DataError: ``num_rows`` is not positive, or the cursor lies past the end of an epoch.
        """
        if num_rows < 1:
            raise DataError(f"a batch has at least one row, not {num_rows}")
        if cursor.position >= self.num_rows:
            raise DataError(f"{cursor}: an epoch has {self.num_rows} rows; the data are not those the cursor is of")
        rows = self._rows(cursor, num_rows)
        ids = cursor.drawn + np.arange(num_rows) if self.kind == "prompts" else rows
        batch, lengths = self._batch(self._train, rows, ids)
        return Drawn(batch, ids, lengths, advance(cursor, num_rows, self.num_rows))

    def heldout(self, start: int = 0, num_rows: int | None = None) -> Drawn:
        """Held-out rows in file order, all or some; ids are their places. An empty batch where there are none."""
        stop = self.num_heldout_rows if num_rows is None else min(start + num_rows, self.num_heldout_rows)
        rows = np.arange(start, max(start, stop), dtype=np.int64)
        batch, lengths = self._batch(self._heldout, rows, rows)
        return Drawn(batch, rows, lengths, Cursor())

    def _rows(self, cursor: Cursor, num_rows: int) -> Int64s:
        parts: list[npt.NDArray[np.int64]] = []
        while num_rows:
            order = self._epoch(cursor.epoch)[cursor.position : cursor.position + num_rows]
            parts.append(order)
            num_rows -= len(order)
            cursor = Cursor(cursor.epoch + 1, 0)
        return np.concatenate(parts)

    def _epoch(self, number: int) -> Int64s:
        if self._order is None or self._order[0] != number:
            self._order = (number, self.mixture.epoch(number))
        return self._order[1]

    def _batch(self, table: TokenTable, rows: Int64s, ids: Int64s) -> tuple[pa.RecordBatch, Int64s]:
        each = self._rows_each
        inside = (rows[:, None] * each + np.arange(each)).ravel()
        tokens, mask = table.take(inside)
        lengths = table.offsets[inside + 1] - table.offsets[inside]
        match self.kind:
            case "prompts":
                origins = pa.array([table.origins[row] for row in rows], pa.string())
                return make_batch(PROMPTS, {"prompt_id": pa.array(ids), "tokens": tokens, "source": origins}), lengths
            case "examples":
                columns = {"example_id": pa.array(ids), "tokens": tokens, "loss_mask": mask}
                return make_batch(EXAMPLES, columns), lengths
            case "comparisons":
                ranks = pa.array(np.tile(np.arange(each, dtype=np.int32), len(rows)))
                columns = {"comparison_id": pa.array(np.repeat(ids, each)), "rank": ranks, "tokens": tokens}
                return make_batch(COMPARISONS, columns), lengths
