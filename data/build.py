"""One source becomes two tables of sequences: what is trained on, and what is held out.

Invariant: every row read is counted once: ``read == filtered + bad + tied + too_long + train + heldout``. Documents
that pre-training packs or cuts into pieces are never too long, and count as documents, however many sequences they
make; a pair of responses that is read as feedback counts once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import xxhash

from data.chat import Rendered, Renderer
from data.config import DataConfig, SourceConfig
from data.errors import EmptyDataError, FormatError, RowError, TooLongError
from data.formats import Kind, recognise
from data.readers import BadRow, Row, read_rows
from data.records import Comparison, Demonstration, Document, Feedback, Prompt, Record, Values, prompt_key
from data.table import TableWriter, TokenTable
from data.tokenize import Encoder, TokenRow, concatenated
from data.tokenizer import Tokenizer, require_eos

logger = logging.getLogger(__name__)

#: A row on its way: what the log calls it, the record, its texts, and the columns kept of it as JSON.
Rendering = tuple[str, Record, list[Rendered], str]

ROWS_AT_A_TIME = 512
MOST_ROWS_NAMED = 20


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one source; ``num_preferences`` of those that are kept have a ``preference``."""

    path: str
    format: str = ""
    read: int = 0
    bad: int = 0
    too_long: int = 0
    train: int = 0
    heldout: int = 0
    filtered: int = 0
    tied: int = 0
    num_preferences: int = 0

    def __str__(self) -> str:
        kept = f"{self.train} kept" + (f", {self.heldout} held out" if self.heldout else "")
        filtered = f", {self.filtered} left out by `where`" if self.filtered else ""
        tied = f", {self.tied} tied" if self.tied else ""
        return f"{self.path}: {self.read} rows read{filtered}, {self.bad} bad{tied}, {self.too_long} too long, {kept}"


@dataclass(frozen=True)
class Built:
    """The sequences of one source, split."""

    train: TokenTable
    heldout: TokenTable
    counts: Counts


def is_heldout(key: bytes, fraction: float) -> bool:
    """Whether a row belongs to the held-out split: by the hash of its prompt, so that it stays there as data grow."""
    return xxhash.xxh3_64_intdigest(key) < fraction * 2.0**64


@dataclass
class _Tally:
    """Counts on their way, and the log of rows left out: the first ones by name."""

    path: str
    format: str = ""
    read: int = 0
    bad: int = 0
    too_long: int = 0
    train: int = 0
    heldout: int = 0
    filtered: int = 0
    tied: int = 0
    num_preferences: int = 0
    longest: int = 0

    def wanted(self, most_rows: int | None) -> int:
        """Rows to take next, where so many are to be kept in all."""
        return ROWS_AT_A_TIME if most_rows is None else min(ROWS_AT_A_TIME, most_rows - self.train - self.heldout)

    def leave_out(self, origin: str, why: str) -> None:
        if self.bad + self.too_long <= MOST_ROWS_NAMED:
            logger.warning("%s: left out: %s", origin, why)
        elif self.bad + self.too_long == MOST_ROWS_NAMED + 1:
            logger.warning("%s: more rows are left out; they are counted from here on, not named", self.path)

    def counts(self) -> Counts:
        kept = (self.train, self.heldout, self.filtered, self.tied, self.num_preferences)
        return Counts(self.path, self.format, self.read, self.bad, self.too_long, *kept)


class _Split:
    """One side of the split: its table, and the documents that are still being packed."""

    def __init__(self, kind: Kind, folder: Path | None, pack_to: int) -> None:
        self.writer = TableWriter(kind, folder)
        self._pack_to = pack_to
        self._open: list[TokenRow] = []
        self._room = pack_to

    def pack(self, row: TokenRow) -> None:
        """Put a document behind the one before, and write the sequences that are full."""
        start = 0
        while len(row.tokens) - start >= self._room:
            start, piece = start + self._room, row.part(start, start + self._room)
            self._write(piece)
        rest = row.part(start, len(row.tokens))
        self._room -= len(rest.tokens)
        self._open.append(rest)

    def finish(self) -> TokenTable:
        """The table. What is left of a packing is a shorter sequence; a lone token, which predicts nothing, is none."""
        if self._pack_to - self._room > 1:
            self._write(TokenRow([], [], 0.0))
        return self.writer.finish()

    def _write(self, last: TokenRow) -> None:
        self.writer.add([concatenated([*self._open, last])], {}, {})
        self._open, self._room = [], self._pack_to


class Builder:
    """Reads, renders, tokenises, filters and splits sources of one kind.

    Args:
        config: formats, limits and what to do with rows that break them.
        kind: what the rows are for.
        tokenizer: the model's.
        whole_document: pre-training: every row is a document, learnt whole, and packed or cut as configured. Else a
            document is one example, and stays a sequence of its own.
        keep_ties: keep comparisons of tied responses that have a ``preference``, which one loss learns from.

    Raises:
        TokenizerError: the tokenizer lacks EOS or a chat template that this needs.
    """

    def __init__(
        self,
        config: DataConfig,
        kind: Kind,
        tokenizer: Tokenizer,
        *,
        whole_document: bool = False,
        keep_ties: bool = False,
    ) -> None:
        if kind != "prompts":
            require_eos(tokenizer, f"has to end every sequence of {kind}")
        self._config = config
        self._kind: Kind = kind
        self._whole_document = whole_document
        self._keep_ties = keep_ties
        self._renderer = Renderer(tokenizer, config.apply_chat_template, config.chat_date)
        self._encoder = Encoder(tokenizer)

    def build(
        self,
        source: SourceConfig,
        heldout_fraction: float,
        folder: Path | None = None,
        *,
        most_rows: int | None = None,
    ) -> Built:
        """All of one source, or its first rows.

        Args:
            source: what to read.
            heldout_fraction: share of the rows that is held out.
            folder: where the tables' files go, in folders that must not be there yet; none: in memory.
            most_rows: how many rows are kept, and nothing behind them is read; none: all.

        Raises:
            DataError: it cannot be read, is of no known format, has a row that is refused, or nothing is left.
        """
        tally, limit = _Tally(source.path), self._config.max_tokens
        names = {False: "train", True: "heldout"}
        splits = {held: _Split(self._kind, folder and folder / name, limit) for held, name in names.items()}
        try:
            records = self._records(source, tally)
            while batch := list(islice(records, tally.wanted(most_rows))):
                self._add(batch, heldout_fraction, splits, tally)
            if not tally.train + tally.heldout:
                longest = f"; the longest has {tally.longest} tokens" if tally.too_long else ""
                raise EmptyDataError(f"{tally.counts()} (data.max_tokens {limit}{longest}): nothing is left")
            logger.info("%s", tally.counts())
            return Built(splits[False].finish(), splits[True].finish(), tally.counts())
        finally:
            for split in splits.values():
                split.writer.abandon()

    def _records(self, source: SourceConfig, tally: _Tally) -> Iterator[Rendering]:
        """The rows that can be rendered."""
        for row in read_rows(source):
            tally.read += 1
            try:
                record = self._record(row, tally)
                if isinstance(record, Comparison) and self._is_left_out(record):
                    tally.tied += 1
                    continue
                rendered = [] if record is None else self._render(record)
                kept = self._kept(row.values) if record is not None and isinstance(row, Row) else "{}"
            except RowError as error:
                self._leave_out_bad(row.origin, error, tally)
            else:
                if record is None:
                    tally.filtered += 1
                else:
                    yield row.origin, record, rendered, kept

    def _leave_out_bad(self, origin: str, error: RowError, tally: _Tally) -> None:
        tally.bad += 1
        if self._config.bad_rows == "refuse":
            raise RowError(f"{origin}: {error} (data.bad_rows: skip leaves such rows out)") from error
        tally.leave_out(origin, str(error))

    def _record(self, row: Row | BadRow, tally: _Tally) -> Record | None:
        """The row in canonical form; none where the source does not want it."""
        if isinstance(row, BadRow):
            raise RowError(row.why)
        if not row.wanted:
            return None
        columns = frozenset(name for name, value in row.values.items() if value is not None)
        try:
            known = recognise(columns, self._kind, whole_document=self._whole_document)
        except FormatError as error:
            if tally.format:
                raise RowError(str(error)) from error
            raise FormatError(f"{row.origin}: {error}") from error
        if not tally.format:
            tally.format = str(known)
            ignored = sorted(columns.difference(known.columns, known.optional))
            logger.info("%s: format %s, columns not used: %s", tally.path, known, ", ".join(ignored) or "none")
        record = known.parse(row.values)
        if isinstance(record, Comparison):
            self._require_margin(record)
        return record

    def _is_left_out(self, comparison: Comparison) -> bool:
        """It says of no response that it is better, nor, where that is learnt, how surely."""
        return comparison.is_tied and not (self._keep_ties and comparison.preference is not None)

    def _render(self, record: Record) -> list[Rendered]:
        match record:
            case Document():
                return [self._renderer.document(record)]
            case Prompt():
                return [self._renderer.prompt(record)]
            case Comparison(prompt, responses):
                return [self._renderer.response(prompt, response) for response in responses]
            case Feedback(prompt, response):
                return [self._renderer.response(prompt, response)]
            case Demonstration():
                rendered = self._renderer.demonstration(record)
                if self._whole_document or self._config.learn_from == "everything":
                    rendered = replace(rendered, spans=((0, len(rendered.text)),))
                return [rendered]

    def _add(
        self,
        batch: list[Rendering],
        fraction: float,
        splits: Mapping[bool, _Split],
        tally: _Tally,
    ) -> None:
        rows = iter(self._encoder.encode([rendered for _, _, all_of_it, _ in batch for rendered in all_of_it]))
        cut = self._whole_document and self._config.documents != "separate"
        for origin, record, rendered, kept in batch:
            unit = [next(rows) for _ in rendered]
            if isinstance(record, Comparison) and _indistinct(unit, record.ranks):
                same = RowError("two responses of different ranks are the same tokens")
                self._leave_out_bad(origin, same, tally)
                continue
            if not cut and not (unit := self._fitting(unit, record, origin, tally)):
                continue
            heldout = bool(fraction) and is_heldout(prompt_key(record), fraction)
            tally.heldout += heldout
            tally.train += not heldout
            tally.num_preferences += isinstance(record, Comparison) and record.preference is not None
            if not cut:
                self._write(splits[heldout].writer, unit, record, {"origin": origin, "kept": kept})
            elif self._config.documents == "packed":
                splits[heldout].pack(unit[0])
            else:
                for piece in unit[0].pieces(self._config.max_tokens):
                    splits[heldout].writer.add([piece], {}, {})

    def _write(self, writer: TableWriter, unit: list[TokenRow], record: Record, texts: Mapping[str, str]) -> None:
        """A row's sequences with the columns of the kind; ``texts`` are those of a prompt."""
        prompt_lengths = [row.num_prompt_tokens for row in unit] if self._kind in ("comparisons", "feedback") else []
        match self._kind, record:
            case "comparisons", Comparison():
                surely = 1.0 if record.preference is None else record.preference
                numbers = {"rank": record.ranks, "margin": [self._margin(record)], "preference": [surely]}
                writer.add(unit, {**numbers, "num_prompt_tokens": prompt_lengths}, {"rating": record.rating})
            case "feedback", _:
                labels = [record.desirable] if isinstance(record, Feedback) else [True, False]
                for row, length, label in zip(unit, prompt_lengths, labels, strict=True):
                    writer.add([row], {"num_prompt_tokens": [length], "desirable": [label]}, {})
            case "prompts", _:
                writer.add(unit, {}, texts)
            case _:
                writer.add(unit, {}, {})

    def _kept(self, values: Values) -> str:
        """The columns of a prompt's row that are kept, as JSON."""
        if self._kind != "prompts" or not self._config.keep_columns:
            return "{}"
        for name in self._config.keep_columns:
            if name not in values:
                found = ", ".join(sorted(values))
                raise RowError(f"no column {name!r}, which data.keep_columns asks for; it has {found}")
        try:
            kept = {name: values[name] for name in self._config.keep_columns}
            return json.dumps(kept, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RowError(f"data.keep_columns: a column is not JSON: {error}") from error

    def _require_margin(self, comparison: Comparison) -> None:
        table, rating = self._config.margin_of_rating, comparison.rating
        if table and rating and rating not in table and comparison.margin is None:
            raise RowError(f"rating {rating!r} has no margin in data.margins, which has {', '.join(table)}")

    def _margin(self, comparison: Comparison) -> float:
        """Its own margin, else its rating's."""
        if comparison.margin is not None:
            return comparison.margin
        return self._config.margin_of_rating.get(comparison.rating, 0.0)

    def _fitting(self, unit: list[TokenRow], record: Record, origin: str, tally: _Tally) -> list[TokenRow]:
        """The rows within ``max_tokens``, cut if so configured; none where they are left out."""
        limit, longest = self._config.max_tokens, max(len(row.tokens) for row in unit)
        tally.longest = max(tally.longest, longest)
        if longest <= limit:
            return unit
        why = f"{longest} tokens, data.max_tokens is {limit}"
        if self._config.too_long == "truncate" and self._kind != "prompts":
            cut = [row.cut(limit) for row in unit]
            if not all(row.num_learnt for row in cut):
                why += ", and no token of a response is within it"
            elif isinstance(record, Comparison) and _indistinct(cut, record.ranks):
                why += ", and within it two responses of different ranks are the same tokens"
            else:
                return cut
        if self._config.too_long == "refuse":
            raise TooLongError(f"{origin}: {why} (data.too_long: skip leaves such rows out)")
        tally.too_long += 1
        tally.leave_out(origin, why)
        return []


def _indistinct(rows: list[TokenRow], ranks: tuple[int, ...]) -> bool:
    """Whether the same tokens stand at two ranks."""
    rank_of: dict[tuple[int, ...], int] = {}
    return any(rank_of.setdefault(tuple(row.tokens), rank) != rank for row, rank in zip(rows, ranks, strict=True))
