"""The data of a run: tokenised once, then drawn from batch by batch.

Invariants:

- What is drawn at a cursor depends on the data, the seed and the cursor alone, so a resumed run goes on as if it had
  not stopped. ``fingerprint`` tells whether the data are still the same.
- A row in terms of the configuration is a sequence, a prompt, a response with its label, or a comparison. A comparison
  is two or more adjacent rows of a record batch, best first.
- Ids of examples, comparisons and responses are their places in the data: the same in every epoch and for every seed.
  Those of held-out rows follow those of training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from data.build import Builder, Built, Counts
from data.cache import Cache
from data.config import DataConfig
from data.errors import DataError, EmptyDataError
from data.formats import Kind
from data.mismatch import Mismatch
from data.order import Cursor, Int64s, Mixture, advance
from data.table import Column, Facts, Tables, TokenTable
from data.tokenizer import Tokenizer
from experience.schema import COMPARISONS, EXAMPLES, FEEDBACK, PROMPTS, make_batch

#: A batch's lists begin and end at 32-bit offsets.
MOST_TOKENS = 2**31 - 1


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
        self,
        kind: Kind,
        train: Sequence[TokenTable],
        heldout: Sequence[TokenTable],
        mixture: Mixture,
        counts: tuple[Counts, ...],
    ) -> None:
        self.kind: Kind = kind
        self.counts = counts
        self.mixture = mixture
        self._train = Tables(kind, train)
        self._heldout = Tables(kind, heldout)
        self._all = Tables(kind, [*train, *heldout])
        self._order: tuple[int, Int64s] | None = None
        self._mismatches = [Mismatch(side) for side in (self._train, self._heldout)] if kind == "feedback" else []

    @classmethod
    def from_config(
        cls,
        config: DataConfig,
        kind: Kind,
        tokenizer: Tokenizer,
        *,
        seed: int,
        whole_document: bool = False,
        keep_ties: bool = False,
    ) -> Dataset:
        """Read, tokenise and split all sources.

        Args:
            config: the sources and what to make of them.
            kind: ``prompts`` (of any format the prompt part), ``examples``, ``comparisons`` or ``feedback``.
            tokenizer: the model's own.
            seed: of the order.
            whole_document: pre-training: rows are documents, learnt whole and, as ``documents`` says, packed or cut.
                Else a document is an example, a sequence of its own.
            keep_ties: keep comparisons of two tied responses that have a ``preference``, for a loss that learns from
                it.

        Raises:
            DataError: a source cannot be read, is of no known format or empty, a row is refused, or the tokenizer
                lacks what the data need.
        """
        builder = Builder(config, kind, tokenizer, whole_document=whole_document, keep_ties=keep_ties)
        cache = Cache.of(config, kind, tokenizer, whole_document=whole_document, keep_ties=keep_ties)
        built = [cache.build(builder, source, config.heldout_fraction) for source in config.train]
        extra = [cache.build(builder, source, 0.0) for source in config.heldout]
        for source in built:
            if not len(source.train):
                raise EmptyDataError(f"{source.counts}: nothing is left to train on")
        heldout = [source.train for source in extra] or [source.heldout for source in built]
        if config.heldout_fraction and not any(len(table) for table in heldout):
            counts = "; ".join(str(source.counts) for source in built)
            raise EmptyDataError(
                f"data.heldout_fraction {config.heldout_fraction} holds out nothing ({counts}): raise it, or give "
                "data.heldout"
            )
        weights = tuple(source.weight for source in config.train if source.weight is not None)
        mixture = Mixture(tuple(len(source.train) for source in built), weights or None, seed)
        counts_of_all = tuple(source.counts for source in (*built, *extra))
        return cls(kind, [source.train for source in built], heldout, mixture, counts_of_all)

    @classmethod
    def first_rows(cls, config: DataConfig, kind: Kind, tokenizer: Tokenizer, num_rows: int) -> Dataset:
        """The first rows that are kept of the sources to train on, one source behind the other.

        What stands behind them is not read, and nothing is held out or kept in files.

        Raises:
            DataError: as ``from_config``.
        """
        builder = Builder(config, kind, tokenizer)
        built: list[Built] = []
        for source in config.train:
            left = num_rows - sum(len(part.train) for part in built)
            if left > 0:
                built.append(builder.build(source, 0.0, most_rows=left))
        tables = [part.train for part in built]
        mixture = Mixture(tuple(len(table) for table in tables), None, 0)
        return cls(kind, tables, [], mixture, tuple(part.counts for part in built))

    def __len__(self) -> int:
        """Rows in all: those to train on and those held out, each once."""
        return len(self._all)

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return self.mixture.epoch_rows

    @property
    def num_heldout_rows(self) -> int:
        """Rows held out."""
        return len(self._heldout)

    @property
    def train_facts(self) -> Facts:
        """Of all training rows, each counted once."""
        return self._train.facts

    @property
    def heldout_facts(self) -> Facts:
        """Of all held-out rows."""
        return self._heldout.facts

    @property
    def num_tokens(self) -> int:
        """Tokens of all training rows, each counted once."""
        return self.train_facts.num_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.train_facts.longest, self.heldout_facts.longest)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row in the configuration's terms: of a comparison, those of all its responses."""
        return max(self.train_facts.longest_unit, self.heldout_facts.longest_unit)

    def digest(self) -> str:
        """A digest of the rows, held-out ones too: equal exactly where ids mean the same rows."""
        return str(xxhash.xxh3_128(f"{self.train_facts.digest} {self.heldout_facts.digest}".encode()).hexdigest())

    def fingerprint(self) -> str:
        """A digest of the training rows and of the mixture: equal exactly where a cursor means the same rows."""
        return str(xxhash.xxh3_128(f"{self.mixture!r} {self.train_facts.digest}".encode()).hexdigest())

    def draw(self, cursor: Cursor, num_rows: int) -> Drawn:
        """The next ``num_rows`` rows; a batch may run on into the next epoch.

        Ids of prompts are serial numbers of the draw in the run, never used twice. Other ids are places in the data,
        the same in every epoch.

        Raises:
            DataError: ``num_rows`` is not positive, or the cursor lies past the end of an epoch.
        """
        if num_rows < 1:
            raise DataError(f"a batch has at least one row, not {num_rows}")
        if cursor.position >= self.num_rows:
            raise DataError(f"{cursor}: an epoch has {self.num_rows} rows; the data are not those the cursor is of")
        rows = self._rows(cursor, num_rows)
        ids = cursor.drawn + np.arange(num_rows) if self.kind == "prompts" else rows
        batch, lengths = self._batch(rows, ids)
        return Drawn(batch, ids, lengths, advance(cursor, num_rows, self.num_rows))

    def in_order(self, start: int = 0, num_rows: int | None = None) -> Drawn:
        """Rows by their places, from ``start``: those to train on, then those held out; empty behind the last.

        Every row once: for what is computed once of each and kept. Ids are the places, of prompts too.
        """
        end = len(self._all)
        ids = np.arange(start, max(start, end if num_rows is None else min(start + num_rows, end)), dtype=np.int64)
        batch, lengths = self._batch(ids, ids)
        return Drawn(batch, ids, lengths, Cursor())

    def heldout(self, start: int = 0, num_rows: int | None = None) -> Drawn:
        """Held-out rows in file order, all or some. An empty batch where there are none.

        Ids are places in the data, behind those of the training rows; of prompts, from 0.
        """
        stop = self.num_heldout_rows if num_rows is None else min(start + num_rows, self.num_heldout_rows)
        places = np.arange(start, max(start, stop), dtype=np.int64)
        rows = places + len(self._train)
        ids = places if self.kind == "prompts" else rows
        batch, lengths = self._batch(rows, ids)
        return Drawn(batch, ids, lengths, Cursor())

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

    def _batch(self, places: Int64s, ids: Int64s) -> tuple[pa.RecordBatch, Int64s]:
        taken = self._all.take(places)
        offsets = list_offsets(taken.lengths)
        tokens = pa.ListArray.from_arrays(offsets, pa.array(taken.columns["tokens"]))
        row_ids = pa.array(taken.row_ids)
        match self.kind:
            case "prompts":
                origins = pa.array(taken.texts["origin"], pa.string())
                kept = pa.array(taken.texts["kept"], pa.string())
                columns = {"prompt_id": pa.array(ids), "tokens": tokens, "source": origins, "columns": kept}
                return make_batch(PROMPTS, columns), taken.lengths
            case "examples":
                mask = taken.columns["mask"]
                mask[offsets.to_numpy()[:-1][taken.lengths > 0]] = 0  # nothing predicts the first token of a sequence
                masks = pa.ListArray.from_arrays(offsets, pa.array(mask))
                columns = {"example_id": pa.array(ids), "tokens": tokens, "loss_mask": masks}
                return make_batch(EXAMPLES, columns), taken.lengths
            case "comparisons":
                ratings = np.repeat(np.array(taken.texts["rating"], dtype=object), taken.rows_each)
                columns = {
                    "comparison_id": pa.array(np.repeat(ids, taken.rows_each)),
                    "sequence_id": row_ids,
                    "tokens": tokens,
                    "rating": pa.array(ratings, pa.string()),
                }
                names = ("rank", "num_prompt_tokens", "margin", "preference")
                columns |= {name: pa.array(taken.columns[name]) for name in names}
                return make_batch(COMPARISONS, columns), taken.lengths
            case "feedback":
                columns = {
                    "sequence_id": row_ids,
                    "tokens": tokens,
                    "num_prompt_tokens": pa.array(taken.columns["num_prompt_tokens"]),
                    "desirable": pa.array(taken.columns["desirable"].astype(np.bool_)),
                    "mismatched_tokens": self._mismatched(places),
                }
                return make_batch(FEEDBACK, columns), taken.lengths

    def _mismatched(self, places: Int64s) -> pa.ListArray:
        """The prompt of each place with the response of another, of the same side of the split."""
        sequences: list[Column] = [np.zeros(0, np.int32)] * len(places)
        is_heldout = places >= len(self._train)
        for side, mismatch in enumerate(self._mismatches):
            mine = np.flatnonzero(is_heldout == bool(side))
            found = mismatch.sequences(places[mine] - side * len(self._train))
            for at, sequence in zip(mine.tolist(), found, strict=True):
                sequences[at] = sequence
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        flat = np.concatenate([np.zeros(0, np.int32), *sequences])
        return pa.ListArray.from_arrays(list_offsets(lengths), pa.array(flat))


def list_offsets(lengths: Int64s, most: int = MOST_TOKENS) -> pa.Int32Array:
    """Where lists of these lengths begin, laid end to end, and where the last one ends: (N + 1,).

    >>> list_offsets(np.array([2, 0, 3])).to_pylist()
    [0, 2, 2, 5]

    Args:
        most: what an offset can be.

    Raises:
        DataError: they are longer together.
    """
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if ends[-1] > most:
        raise DataError(
            f"{len(lengths):,} sequences of {ends[-1]:,} tokens in one batch, which takes {most:,}: draw fewer at once"
        )
    return pa.array(ends.astype(np.int32))
