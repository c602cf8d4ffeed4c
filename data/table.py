"""Tokenised rows as flat columns: written once from front to back, in memory or in files, then read at any place.

A table is the sequences of one split of one source. What is drawn as one (a prompt, a sequence, a comparison) is a
unit: the rows of a comparison stand together, for every other kind a unit is a row.

Invariants:

- No token lives as a Python object beyond the batch that it was tokenised in. In memory a token takes 4 bytes, 5 with
  a mask; in files it takes none: they are mapped, and the system reads and forgets pages as it needs to.
- A table is the same, with the same digest, wherever it is kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import xxhash

from data.formats import Kind
from data.tokenize import TokenRow

Int64s = npt.NDArray[np.int64]
Column = npt.NDArray[np.generic]
Flat: TypeAlias = "array[Any]"

#: Type codes, of `array` and of numpy alike: per unit, row, token or byte. What ends in `_ends` says where each list
#: or text ends.
_COLUMNS: dict[Kind, dict[str, str]] = {
    "prompts": {
        "row_ends": "q",
        "tokens": "i",
        "origin_ends": "q",
        "origin": "B",
        "kept_ends": "q",
        "kept": "B",
    },
    "examples": {"row_ends": "q", "tokens": "i", "mask": "B"},
    "comparisons": {
        "row_ends": "q",
        "tokens": "i",
        "unit_ends": "q",
        "rank": "i",
        "num_prompt_tokens": "i",
        "margin": "f",
        "preference": "f",
        "rating_ends": "q",
        "rating": "B",
    },
    "feedback": {"row_ends": "q", "tokens": "i", "num_prompt_tokens": "i", "desirable": "B"},
}
#: Among what `described` gives: values of each column.
_SIZES = "sizes"


class Buffers(Protocol):
    """Columns that grow at their ends."""

    def append(self, name: str, values: Flat) -> None:
        """Put values behind those of one column."""

    def finish(self) -> dict[str, Column]:
        """The columns, read only."""


class MemoryBuffers:
    """Columns in memory."""

    def __init__(self, codes: Mapping[str, str]) -> None:
        self._arrays = {name: array(code) for name, code in codes.items()}

    def append(self, name: str, values: Flat) -> None:
        """Put values behind those of one column."""
        self._arrays[name].extend(values)

    def finish(self) -> dict[str, Column]:
        """The columns, read only."""
        columns = {}
        for name, values in self._arrays.items():
            columns[name] = np.asarray(values, dtype=values.typecode)
            columns[name].flags.writeable = False
        return columns


class FileBuffers:
    """Columns in files of a folder, one each, bare values in the machine's byte order."""

    def __init__(self, codes: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self._codes, self._folder = codes, folder
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("wb", buffering=1 << 20) for name in codes}

    def append(self, name: str, values: Flat) -> None:
        """Put values behind those of one column."""
        self._files[name].write(memoryview(values))

    def finish(self) -> dict[str, Column]:
        """The columns, read only."""
        self.close()
        return mapped(self._codes, self._folder)

    def close(self) -> None:
        """Write out what is buffered, and free the files."""
        for file in self._files.values():
            file.close()


def mapped(codes: Mapping[str, str], folder: Path) -> dict[str, Column]:
    """The columns that ``FileBuffers`` wrote, mapped."""
    columns = {}
    for name, code in codes.items():
        size = (folder / name).stat().st_size // np.dtype(code).itemsize
        whole = np.memmap(folder / name, code, "r", shape=(size,)) if size else np.zeros(0, code)
        columns[name] = np.asarray(whole)
    return columns


@dataclass
class Facts:
    """Of a table. ``longest_unit`` is in tokens of all rows of a unit, ``most_rows`` the rows of the unit with most.

    Bytes are UTF-8 of what is learnt.
    """

    num_units: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    longest: int = 0
    longest_unit: int = 0
    most_rows: int = 0
    num_learnt_tokens: int = 0
    num_learnt_bytes: float = 0.0
    digest: str = ""


class TableWriter:
    """Writes one table.

    Args:
        kind: what the rows are for.
        folder: where its files go; none: in memory. It must not be there yet.
    """

    def __init__(self, kind: Kind, folder: Path | None = None) -> None:
        self._kind = kind
        self._codes = _COLUMNS[kind]
        self._buffers: Buffers = MemoryBuffers(self._codes) if folder is None else FileBuffers(self._codes, folder)
        self._ends = {name: 0 for name in self._codes if name.endswith("_ends")}
        self._facts = Facts()

    def add(
        self, rows: Sequence[TokenRow], numbers: Mapping[str, Iterable[float]], texts: Mapping[str, str]
    ) -> None:
        """Append the rows of one unit, and the kind's other columns."""
        for row in rows:
            self._append("tokens", row.tokens)
            self._close("row_ends", len(row.tokens))
            if "mask" in self._codes:
                self._append("mask", row.mask)
        if "unit_ends" in self._codes:
            self._close("unit_ends", len(rows))
        for name, values in numbers.items():
            self._append(name, values)
        for name, text in texts.items():
            encoded = text.encode()
            self._append(name, encoded)
            self._close(f"{name}_ends", len(encoded))
        self._count(rows)

    def _append(self, name: str, values: Iterable[float]) -> None:
        self._buffers.append(name, array(self._codes[name], cast("Iterable[int]", values)))

    def _close(self, name: str, length: int) -> None:
        self._ends[name] += length
        self._append(name, (self._ends[name],))

    def _count(self, rows: Sequence[TokenRow]) -> None:
        facts, lengths = self._facts, [len(row.tokens) for row in rows]
        facts.num_units += 1
        facts.num_rows += len(rows)
        facts.num_tokens += sum(lengths)
        facts.longest = max(facts.longest, *lengths)
        facts.longest_unit = max(facts.longest_unit, sum(lengths))
        facts.most_rows = max(facts.most_rows, len(rows))
        facts.num_learnt_tokens += sum(row.num_learnt for row in rows)
        facts.num_learnt_bytes += sum(row.num_learnt * row.bytes_each for row in rows)

    def finish(self) -> TokenTable:
        """The table. Nothing can be added to it."""
        columns = self._buffers.finish()
        digest = xxhash.xxh3_128(self._kind.encode())
        for name, values in columns.items():
            digest.update(f"{name} {len(values)}".encode())
            digest.update(values.data)
        self._facts.digest = digest.hexdigest()
        return TokenTable(self._kind, columns, self._facts)

    def abandon(self) -> None:
        """Free what a table that is not finished holds open."""
        if isinstance(self._buffers, FileBuffers):
            self._buffers.close()


@dataclass(frozen=True)
class TokenTable:
    """Finished sequences: the columns of ``kind`` and what is known of them as a whole."""

    kind: Kind
    columns: Mapping[str, Column]
    facts: Facts

    @classmethod
    def open(cls, kind: Kind, folder: Path, facts: Mapping[str, Any]) -> TokenTable:
        """A table from files, and from the facts as ``described`` gave them.

        Raises:
            OSError: a file is not there.
            ValueError: a file is not as long as it was.
            KeyError: the facts say nothing of a column.
        """
        columns = mapped(_COLUMNS[kind], folder)
        sizes = {name: len(values) for name, values in columns.items()}
        wrong = [f"{name} {size}" for name, size in sizes.items() if size != dict(facts[_SIZES])[name]]
        if wrong:
            raise ValueError(f"{folder}: holds another number of values than was written: {', '.join(wrong)}")
        return cls(kind, columns, Facts(**{name: fact for name, fact in facts.items() if name != _SIZES}))

    def described(self) -> dict[str, Any]:
        """The facts, and how many values each column has, for JSON."""
        return {**asdict(self.facts), _SIZES: {name: len(values) for name, values in self.columns.items()}}

    def __len__(self) -> int:
        return self.facts.num_units

    def bounds(self, ends: str, first: int, last: int) -> Int64s:
        """Where the items [first, last) of a column begin, and where the last of them ends: (last - first + 1,)."""
        values = self.columns[ends]
        start = values[first - 1 : first] if first else np.zeros(1, np.int64)
        return cast(Int64s, np.concatenate([start, values[first:last]]))

    def rows_of(self, unit: int) -> tuple[int, int]:
        """The rows [first, last) of a unit."""
        if "unit_ends" not in self.columns:
            return unit, unit + 1
        first, last = self.bounds("unit_ends", unit, unit + 1)
        return int(first), int(last)

    def text(self, name: str, unit: int) -> str:
        """The text of a unit in the column ``name``."""
        first, last = self.bounds(f"{name}_ends", unit, unit + 1)
        return self.columns[name][first:last].tobytes().decode()


@dataclass(frozen=True)
class Units:
    """Units taken from tables. ``columns`` are per row, ``tokens`` and ``mask`` among them flat; ``texts`` per unit.

    ``row_ids`` (N,) are the rows' places over all tables, ``lengths`` (N,) their tokens, ``rows_each`` (U,) the rows
    of each unit.
    """

    row_ids: Int64s
    lengths: Int64s
    rows_each: Int64s
    columns: Mapping[str, Column]
    texts: Mapping[str, Sequence[str]]


#: Columns with one value a unit, which each of its rows gets.
_OF_UNIT = ("margin", "preference")
_TEXTS = ("origin", "kept", "rating")


class Tables:
    """Tables one behind the other; units and rows are numbered through all of them."""

    def __init__(self, kind: Kind, tables: Sequence[TokenTable]) -> None:
        self.kind = kind
        self._tables = tuple(tables)
        self._unit_starts = np.cumsum([0, *(len(table) for table in tables)])
        self._row_starts = np.cumsum([0, *(table.facts.num_rows for table in tables)])

    def __len__(self) -> int:
        return int(self._unit_starts[-1])

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return int(self._row_starts[-1])

    @property
    def facts(self) -> Facts:
        """Of all tables together; the digest is of their digests."""
        parts = [table.facts for table in self._tables]
        digest = xxhash.xxh3_128(" ".join(part.digest for part in parts).encode()).hexdigest()
        return Facts(
            num_units=len(self),
            num_rows=self.num_rows,
            num_tokens=sum(part.num_tokens for part in parts),
            longest=max((part.longest for part in parts), default=0),
            longest_unit=max((part.longest_unit for part in parts), default=0),
            most_rows=max((part.most_rows for part in parts), default=0),
            num_learnt_tokens=sum(part.num_learnt_tokens for part in parts),
            num_learnt_bytes=sum(part.num_learnt_bytes for part in parts),
            digest=digest,
        )

    def take(self, units: Int64s) -> Units:
        """Copy some units, in the order given."""
        codes = _COLUMNS[self.kind]
        texts: dict[str, list[str]] = {name: [] for name in _TEXTS if name in codes}
        parts: dict[str, list[Column]] = {
            name: [] for name in codes if not name.endswith("_ends") and name not in texts
        }
        row_ids: list[Int64s] = []
        lengths: list[Int64s] = []
        which = np.searchsorted(self._unit_starts, units, side="right") - 1
        for number, unit in zip(which.tolist(), units.tolist(), strict=True):
            table, local = self._tables[number], unit - int(self._unit_starts[number])
            first, last = table.rows_of(local)
            bounds = table.bounds("row_ends", first, last)
            row_ids.append(np.arange(first, last) + self._row_starts[number])
            lengths.append(np.diff(bounds))
            for name, found in parts.items():
                if name in ("tokens", "mask"):
                    found.append(table.columns[name][bounds[0] : bounds[-1]])
                elif name in _OF_UNIT:
                    found.append(np.repeat(table.columns[name][local], last - first))
                else:
                    found.append(table.columns[name][first:last])
            for name, said in texts.items():
                said.append(table.text(name, local))
        return Units(
            cast(Int64s, _joined(row_ids, "q")),
            cast(Int64s, _joined(lengths, "q")),
            np.array([len(ids) for ids in row_ids], np.int64),
            {name: _joined(found, codes[name]) for name, found in parts.items()},
            texts,
        )


def _joined(parts: Sequence[Column], code: str) -> Column:
    return np.concatenate(parts) if parts else np.zeros(0, code)
