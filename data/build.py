"""One source becomes two tables of sequences: what is trained on, and what is held out.

Invariant: every row read is counted once: ``read == bad + too_long + train + heldout``. Documents that are packed
are never too long, and count as documents, however many sequences they make.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import xxhash

from data.chat import Rendered, Renderer
from data.config import DataConfig, SourceConfig
from data.errors import EmptyDataError, FormatError, RowError, TooLongError
from data.formats import Comparison, Demonstration, Document, Kind, Prompt, Record, prompt_key, recognise
from data.readers import BadRow, Row, read_rows
from data.tokenize import Encoder, TokenRow, TokenStore, TokenTable, join
from data.tokenizer import Tokenizer, require_eos

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 512
MOST_ROWS_NAMED = 20


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one source."""

    path: str
    format: str = ""
    read: int = 0
    bad: int = 0
    too_long: int = 0
    train: int = 0
    heldout: int = 0

    def __str__(self) -> str:
        kept = f"{self.train} kept" + (f", {self.heldout} held out" if self.heldout else "")
        return f"{self.path}: {self.read} rows read, {self.bad} bad, {self.too_long} too long, {kept}"


@dataclass(frozen=True)
class Built:
    """The sequences of one source. Comparisons take two rows each, the chosen one first."""

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
    longest: int = 0

    def leave_out(self, origin: str, why: str) -> None:
        if self.bad + self.too_long <= MOST_ROWS_NAMED:
            logger.warning("%s: left out: %s", origin, why)
        elif self.bad + self.too_long == MOST_ROWS_NAMED + 1:
            logger.warning("%s: more rows are left out; they are counted from here on, not named", self.path)

    def counts(self) -> Counts:
        return Counts(self.path, self.format, self.read, self.bad, self.too_long, self.train, self.heldout)


@dataclass
class _Stores:
    """Where sequences go, by split and by whether they are packed."""

    with_mask: bool
    rows: dict[bool, TokenStore] = field(default_factory=dict)
    packed: dict[bool, TokenStore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stores in (self.rows, self.packed):
            stores.update({heldout: TokenStore(self.with_mask) for heldout in (False, True)})

    def table(self, heldout: bool, max_tokens: int) -> TokenTable:
        return join([self.rows[heldout].finish(), self.packed[heldout].finish(pack_to=max_tokens)])


class Builder:
    """Reads, renders, tokenises, filters and splits sources of one kind.

    Args:
        config: formats, limits and what to do with rows that break them.
        kind: what the rows are for.
        tokenizer: the model's.
        whole_document: pre-training: every row is a document, learnt whole.

    Raises:
        TokenizerError: the tokenizer lacks EOS or a chat template that this needs.
    """

    def __init__(self, config: DataConfig, kind: Kind, tokenizer: Tokenizer, *, whole_document: bool = False) -> None:
        if kind != "prompts":
            require_eos(tokenizer, f"has to end every sequence of {kind}")
        self._config = config
        self._kind: Kind = kind
        self._whole_document = whole_document
        self._renderer = Renderer(tokenizer, config.apply_chat_template)
        self._encoder = Encoder(tokenizer)

    def build(self, source: SourceConfig, heldout_fraction: float) -> Built:
        """All of one source.

        Raises:
            DataError: it cannot be read, is of no known format, has a row that is refused, or nothing is left.
        """
        tally = _Tally(source.path)
        stores = _Stores(with_mask=self._kind == "examples")
        records = self._records(source, tally)
        while batch := list(islice(records, ROWS_AT_A_TIME)):
            self._add(batch, heldout_fraction, stores, tally)
        max_tokens = self._config.max_tokens
        if not tally.train + tally.heldout:
            longest = f"; the longest has {tally.longest} tokens" if tally.too_long else ""
            raise EmptyDataError(f"{tally.counts()} (data.max_tokens {max_tokens}{longest}): nothing is left")
        logger.info("%s", tally.counts())
        return Built(stores.table(False, max_tokens), stores.table(True, max_tokens), tally.counts())

    def _records(self, source: SourceConfig, tally: _Tally) -> Iterator[tuple[str, Record, list[Rendered]]]:
        """The rows that can be rendered, each with its origin."""
        for row in read_rows(source):
            tally.read += 1
            try:
                record = self._record(row, tally)
                rendered = self._render(record)
            except RowError as error:
                tally.bad += 1
                if self._config.bad_rows == "refuse":
                    raise RowError(f"{row.origin}: {error} (data.bad_rows: skip leaves such rows out)") from error
                tally.leave_out(row.origin, str(error))
            else:
                yield row.origin, record, rendered

    def _record(self, row: Row | BadRow, tally: _Tally) -> Record:
        if isinstance(row, BadRow):
            raise RowError(row.why)
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
        return known.parse(row.values)

    def _render(self, record: Record) -> list[Rendered]:
        match record:
            case Document():
                return [self._renderer.document(record)]
            case Prompt():
                return [self._renderer.prompt(record)]
            case Comparison(prompt, chosen, rejected):
                return [self._renderer.response(prompt, chosen), self._renderer.response(prompt, rejected)]
            case Demonstration():
                rendered = self._renderer.demonstration(record)
                if self._whole_document or self._config.learn_from == "everything":
                    rendered = replace(rendered, spans=((0, len(rendered.text)),))
                return [rendered]

    def _add(
        self, batch: list[tuple[str, Record, list[Rendered]]], fraction: float, stores: _Stores, tally: _Tally
    ) -> None:
        rows = iter(self._encoder.encode([rendered for _, _, all_of_it in batch for rendered in all_of_it]))
        for origin, record, rendered in batch:
            whole = self._whole_document or isinstance(record, Document)
            packed = whole and self._config.documents == "packed"
            unit = [next(rows) for _ in rendered]
            unit = unit if packed else self._fitting(unit, origin, tally)
            if not unit:
                continue
            heldout = bool(fraction) and is_heldout(prompt_key(record), fraction)
            store = (stores.packed if packed else stores.rows)[heldout]
            for row in unit:
                store.add(row)
            if self._kind == "prompts":
                store.origins.append(origin)
            tally.heldout += heldout
            tally.train += not heldout

    def _fitting(self, unit: list[TokenRow], origin: str, tally: _Tally) -> list[TokenRow]:
        """The rows within ``max_tokens``, cut if so configured; none where they are left out."""
        limit, longest = self._config.max_tokens, max(len(row.tokens) for row in unit)
        tally.longest = max(tally.longest, longest)
        if longest <= limit:
            return unit
        why = f"{longest} tokens, data.max_tokens is {limit}"
        if self._config.too_long == "truncate" and self._kind != "prompts":
            cut = [row.cut(limit) for row in unit]
            if all(any(row.mask[1:]) for row in cut):
                return cut
            why += ", and no token of a response is within it"
        if self._config.too_long == "refuse":
            raise TooLongError(f"{origin}: {why} (data.too_long: skip leaves such rows out)")
        tally.too_long += 1
        tally.leave_out(origin, why)
        return []
