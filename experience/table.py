"""The experience of an iteration: the columns of all roles joined over the same rows, in memory and as a file.

Invariants:

- Columns are joined by position, and a join that exists has been checked: the same ``sample_id`` in the same
  places, no sample twice, every per-token column as long as its response.
- Joining, slicing and reading a file copy no values: a column stays the buffers that its role wrote, or the
  pages of the file.
- A file is complete or not there: it is written beside its place, flushed to disk, and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experience.schema import (
    ALL,
    NAME_KEY,
    ROLLOUT,
    SCHEMA_VERSION,
    VERSION_KEY,
    Int64Array,
    SchemaError,
    check_schema,
    require_same_rows,
    schema_name,
)

#: What a row's column reads as: numbers and text as Python's own, lists as numpy arrays that share the memory.
Cell: TypeAlias = int | float | str | npt.NDArray[np.generic]

NAME = b"experience"
#: Lists of another length than the policy's tokens.
NOT_PER_TOKEN = frozenset({"tokens", "turn_starts", "turn_ends"})
#: Lists that may also be empty in every row.
MAY_BE_EMPTY = frozenset({"environment_rewards"})
RESERVED_KEYS = frozenset({VERSION_KEY.decode(), NAME_KEY.decode()})


@dataclass(frozen=True)
class Experience:
    """Rows with the columns of several roles. Made by ``join`` or ``Experience.open``.

    ``table`` is an Arrow table of plain columns: DuckDB, Polars and pandas take it as it is.
    """

    table: pa.Table

    @property
    def num_rows(self) -> int:
        """Samples."""
        return int(self.table.num_rows)

    @property
    def metadata(self) -> dict[str, str]:
        """What ``write`` was given, read back."""
        stored = {key.decode(): value.decode() for key, value in (self.table.schema.metadata or {}).items()}
        return {key: value for key, value in stored.items() if key not in RESERVED_KEYS}

    def row(self, index: int) -> dict[str, Cell]:
        """One row, by column, for people and tests (50 us a row). Lists share memory with the table: do not write.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        return {name: _cell(self.table.column(name)[index]) for name in self.table.column_names}

    def write(self, path: Path, metadata: Mapping[str, str | int | float] | None = None) -> int:
        """Write one Arrow IPC file and return its size in bytes. Replaces a file of the same name.

        Args:
            path: the file; its folder must exist.
            metadata: facts about the whole, such as the iteration, kept as text in the file's schema.

        Raises:
            OSError: the disk is full or the folder is not there; no file is left behind.
            ValueError: a metadata key that the schema uses for itself.
        """
        facts = {key: str(value) for key, value in (metadata or {}).items()}
        if reserved := RESERVED_KEYS & facts.keys():
            raise ValueError(f"metadata keys {sorted(reserved)} belong to the schema")
        kept = {**(self.table.schema.metadata or {}), **{key.encode(): fact.encode() for key, fact in facts.items()}}
        return write_table(self.table.replace_schema_metadata(kept), path)

    @classmethod
    def open(cls, path: Path) -> Experience:
        """Map a file that ``write`` made and check it as ``join`` does, which reads ids and offsets alone.

        Raises:
            FileNotFoundError: no such file.
            SchemaError: not an Arrow file, cut short, of another version, or with columns that do not fit.
        """
        table = open_table(path)
        stored = table.schema.metadata or {}
        version, name = stored.get(VERSION_KEY, b"none").decode(), schema_name(table.schema)
        if name != NAME.decode() or version != str(SCHEMA_VERSION):
            raise SchemaError(f"{path}: holds {name} of version {version}, expected experience of {SCHEMA_VERSION}")
        _check_rows(table)
        return cls(table)


def join(rollouts: Sequence[pa.RecordBatch], *columns: Sequence[pa.RecordBatch]) -> Experience:
    """Join rollouts with the columns that roles computed for them.

    Each of ``columns`` holds one role's batches, of one schema; laid end to end they cover the same rows as
    ``rollouts`` in the same order. They may be cut at other rows than the rollouts, as ranks do.

    Raises:
        SchemaError: a batch of another schema or version, rows that do not match (naming the first), a column
            given twice, a sample twice, turns that do not follow each other, or a per-token column that is not as long
            as the policy's turns.
    """
    base = _concatenate(rollouts)
    if schema_name(base.schema) != schema_name(ROLLOUT):
        raise SchemaError(f"the first batches of a join are rollouts, got {schema_name(base.schema)}")
    fields, arrays = list(base.schema), list(base.columns)
    for batches in columns:
        part = _concatenate(batches)
        require_same_rows(base.column("sample_id"), part)
        for field, array in zip(part.schema, part.columns, strict=True):
            if field.name == "sample_id":
                continue
            if field.name in {known.name for known in fields}:
                raise SchemaError(f"{schema_name(part.schema)}: column {field.name} is there already")
            fields.append(field)
            arrays.append(array)
    metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode(), NAME_KEY: NAME}
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=metadata))
    _check_rows(table)
    return Experience(table)


def write_table(table: pa.Table, path: Path) -> int:
    """Write an Arrow IPC file beside its place, flush it to disk, rename it, and return its size in bytes.

    The file is not compressed, so that it can be mapped and used in place.

    Raises:
        OSError: as from the file system; what was written is removed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as sink:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            sink.flush()
            os.fsync(sink.fileno())
            size = sink.tell()
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return size


def open_table(path: Path) -> pa.Table:
    """Map an Arrow IPC file. Its columns are the file's pages, read-only.

    Raises:
        FileNotFoundError: no such file.
        SchemaError: not an Arrow file, or one cut short.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{path}: not a whole Arrow file: {error}") from error


def _concatenate(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """The batches end to end, without a copy; all of one schema of ours."""
    if not batches:
        raise SchemaError("a role gave no batch at all; an empty one carries its schema")
    name = schema_name(batches[0].schema)
    if name not in ALL:
        raise SchemaError(f"no schema is called {name}; there are {sorted(ALL)}")
    for batch in batches:
        check_schema(batch, ALL[name])
    return pa.Table.from_batches([batch.replace_schema_metadata(ALL[name].metadata) for batch in batches])


def _check_rows(table: pa.Table) -> None:
    if missing := [name for name in ROLLOUT.names if name not in table.column_names]:
        raise SchemaError(f"experience: no columns {missing}; there are {table.column_names}")
    ids = np.asarray(table.column("sample_id"), dtype=np.int64)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise SchemaError(f"experience: sample {unique[counts > 1][0]} is there {counts.max()} times")
    responses = _checked_turns(table, ids)
    for field in table.schema:
        if field.name in NOT_PER_TOKEN or not pa.types.is_list(field.type):
            continue
        lengths = _lengths(table.column(field.name))
        if field.name in MAY_BE_EMPTY and not lengths.any():
            continue
        if not np.array_equal(lengths, responses):
            at = int(np.flatnonzero(lengths != responses)[0])
            where = f"{field.name} of sample {ids[at]}"
            raise SchemaError(f"experience: {where} has {lengths[at]} values for a response of {responses[at]} tokens")


def _checked_turns(table: pa.Table, ids: Int64Array) -> Int64Array:
    """Tokens that the policy drew in each sample; its turns are as ``experience.turns`` says."""
    totals, num_turns = _lengths(table.column("tokens")), _lengths(table.column("turn_starts"))
    prompts = np.asarray(table.column("num_prompt_tokens"), dtype=np.int64)
    starts, ends = (np.asarray(table.column(name).combine_chunks().flatten()) for name in ("turn_starts", "turn_ends"))
    if not np.array_equal(num_turns, _lengths(table.column("turn_ends"))) or not (num_turns > 0).all():
        raise SchemaError("experience: turn_starts and turn_ends differ in number, or a sample has no turn")
    rows, last = np.repeat(np.arange(len(ids)), num_turns), np.cumsum(num_turns) - 1
    # Each turn begins behind the one before and a word of the environment; the first one where the prompt ends.
    least = np.concatenate([np.zeros(1, np.int64), ends + 1])[:-1]
    least[last - num_turns + 1] = prompts
    wrong = (starts < least) | (ends < starts)
    wrong[last - num_turns + 1] |= starts[last - num_turns + 1] != prompts
    wrong[last] |= ends[last] != totals
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise SchemaError(
            f"experience: sample {ids[rows[at]]} has {totals[rows[at]]} tokens, {prompts[rows[at]]} of them prompt, "
            f"and a turn from {starts[at]} to {ends[at]}; turns go from the prompt's end to the sample's"
        )
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])[np.concatenate([[0], last + 1])]
    lengths: Int64Array = np.diff(sums).astype(np.int64)
    return lengths


def _lengths(column: pa.ChunkedArray) -> Int64Array:
    chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks if len(chunk)]
    lengths: Int64Array = np.concatenate([np.zeros(0, np.int64), *chunks]).astype(np.int64)
    return lengths


def _cell(scalar: pa.Scalar) -> Cell:
    if pa.types.is_list(scalar.type):
        values: npt.NDArray[np.generic] = scalar.values.to_numpy()
        return values
    cell: int | float | str = scalar.as_py()
    return cell
