"""Arrow buffers as torch tensors, without a copy, and back.

Invariants:

- ``list_column``, ``scalar_column`` of one batch, and ``list_array`` share memory with what they are given. Buffers
  from the object store or a memory map are read-only, and torch has no read-only tensors: **never write into a
  column's tensors**; a write into a mapped file ends the process. ``gather`` and ``pack`` copy, so theirs are free.
- Tensors come through DLPack, not through numpy: numpy's way warns about read-only memory at the first use.
- A column over several batches stays one view per batch; nothing concatenates a whole column.

Legend: N rows (samples), T tokens of all rows in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from experience.schema import SchemaError, schema_name

Batches: TypeAlias = pa.RecordBatch | pa.Table | Sequence[pa.RecordBatch]

MAX_LIST_VALUES = 2**31 - 1


@dataclass(frozen=True)
class ListColumn:
    """A list column as flat values and offsets.

    ``chunks`` holds the flat values of each batch. ``offsets`` (N+1,) int64 counts through all of them: row i is
    ``offsets[i]`` to ``offsets[i + 1]`` of the chunks laid end to end. A row never spans two chunks.
    """

    chunks: tuple[Tensor, ...]
    offsets: Tensor
    chunk_starts: Tensor

    @property
    def num_rows(self) -> int:
        """Rows, N."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (N,) int64."""
        return self.offsets.diff()

    @property
    def values(self) -> Tensor:
        """All values, (T,): a view where there is one chunk, else a **copy** of them all."""
        return self.chunks[0] if len(self.chunks) == 1 else torch.cat(self.chunks)

    def row(self, index: int) -> Tensor:
        """Values of one row, a view.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        start, stop = self.offsets[index].item(), self.offsets[index + 1].item()
        chunk = int(torch.searchsorted(self.chunk_starts, start, right=True)) - 1
        base = int(self.chunk_starts[chunk])
        return self.chunks[chunk][int(start) - base : int(stop) - base]

    def rows(self, indices: Sequence[int]) -> list[Tensor]:
        """Values of several rows, views, in the order asked for."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        _require_rows(index, self.num_rows)
        starts, stops = self.offsets[index], self.offsets[index + 1]
        chunk = torch.searchsorted(self.chunk_starts, starts, right=True) - 1
        base = self.chunk_starts[chunk]
        places = zip(chunk.tolist(), (starts - base).tolist(), (stops - base).tolist(), strict=True)
        return [self.chunks[at][start:stop] for at, start, stop in places]

    def gather(self, indices: Sequence[int]) -> Tensor:
        """Values of several rows end to end, in the order asked for: a copy, (T,)."""
        rows = self.rows(indices)
        return torch.cat(rows) if rows else self.chunks[0].new_empty(0)


@dataclass(frozen=True)
class PackedRows:
    """Sequences laid end to end, as packed attention takes them.

    ``tokens`` (T,) int64; ``position_ids`` (T,) int64, restarting at 0 with each row; ``offsets`` (N+1,) int64.
    """

    tokens: Tensor
    position_ids: Tensor
    offsets: Tensor

    def to(self, device: torch.device | str) -> PackedRows:
        """The same on ``device``."""
        moved = (part.to(device, non_blocking=True) for part in (self.tokens, self.position_ids, self.offsets))
        return PackedRows(*moved)


def columns_of(batches: Batches) -> list[str]:
    """The names of the columns of one or several batches."""
    given = _listed(batches)
    return list(given[0].schema.names) if given else []


def list_column(batches: Batches, name: str) -> ListColumn:
    """View the list column ``name`` of one or several batches as tensors, without copying its values.

    Raises:
        SchemaError: no such column, not a list of numbers, or it holds nulls.
    """
    chunks: list[Tensor] = []
    ends = [np.zeros(1, np.int64)]
    starts: list[int] = []
    total = 0
    for array in _arrays(batches, name):
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            raise SchemaError(f"column {name} is {array.type}, expected a list")
        _refuse_nulls(array, name)
        if not len(array):
            continue
        # `values` and `offsets` know the slice's rows; `values` does not start at the slice's first row.
        bounds = array.offsets.to_numpy().astype(np.int64)
        first, last = int(bounds[0]), int(bounds[-1])
        chunks.append(_view(array.values.slice(first, last - first), name))
        ends.append(bounds[1:] - first + total)
        starts.append(total)
        total += last - first
    if not chunks:
        zero = torch.zeros(1, dtype=torch.int64)
        return ListColumn((_empty(batches, name),), zero, zero)
    return ListColumn(tuple(chunks), torch.from_numpy(np.concatenate(ends)), torch.tensor(starts, dtype=torch.int64))


def scalar_column(batches: Batches, name: str) -> Tensor:
    """The numbers of column ``name``, (N,): a view for one batch, a copy for several.

    Raises:
        SchemaError: no such column, not numbers, or it holds nulls.
    """
    views = []
    for array in _arrays(batches, name):
        _refuse_nulls(array, name)
        views.append(_view(array, name))
    return views[0] if len(views) == 1 else torch.cat(views)


def pack(tokens: ListColumn, rows: Sequence[int]) -> PackedRows:
    """Lay the token sequences of ``rows`` end to end, in that order. Copies, once.

    >>> batch = pa.record_batch({"tokens": pa.array([[5, 6, 7], [8], [9, 10]], pa.list_(pa.int32()))})
    >>> packed = pack(list_column(batch, "tokens"), [2, 0])
    >>> packed.tokens.tolist(), packed.position_ids.tolist(), packed.offsets.tolist()
    ([9, 10, 5, 6, 7], [0, 1, 0, 1, 2], [0, 2, 5])
    """
    lengths = tokens.lengths[torch.as_tensor(rows, dtype=torch.int64)]
    offsets = _offsets(lengths)
    positions = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    return PackedRows(tokens.gather(rows).long(), positions, offsets)


def prediction_positions(offsets: Tensor, num_prompt_tokens: Tensor) -> Tensor:
    """Where, in packed sequences, each response token is predicted from: the position just before it.

    The logits at these positions are of the response tokens ``tokens[positions + 1]``, and the critic's outputs
    there are the values of the prefixes before them.

    Args:
        offsets: (N+1,) int64, of whole sequences in the pack.
        num_prompt_tokens: (N,) prompt length of each.

    Returns:
        (T,) int64 over the response tokens of all rows, in the order of the pack.

    Raises:
        ValueError: a row has no prompt token, or fewer tokens than its prompt; named by its place in the pack.
    """
    prompts = num_prompt_tokens.to(offsets)
    responses = offsets.diff() - prompts
    wrong = (prompts < 1) | (responses < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        total = int(offsets[row + 1] - offsets[row])
        raise ValueError(f"row {row} of the pack has {total} tokens, {int(prompts[row])} of them prompt")
    response_offsets = _offsets(responses)
    within = torch.arange(int(response_offsets[-1]), device=offsets.device)
    return within + torch.repeat_interleave(offsets[:-1] + prompts - 1 - response_offsets[:-1], responses)


def list_array(values: Tensor, offsets: Tensor) -> pa.ListArray:
    """A list column of N rows from flat values (T,) and offsets (N+1,); shares memory with CPU ``values``.

    Raises:
        ValueError: ``offsets`` do not rise from 0 to T, or T does not fit Arrow's 32-bit offsets.
    """
    bounds = offsets.detach().cpu().to(torch.int64)
    if len(bounds) < 1 or int(bounds[0]) != 0 or int(bounds[-1]) != len(values) or bool((bounds.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the {len(values)} values")
    if len(values) > MAX_LIST_VALUES:
        raise ValueError(f"{len(values)} values in one batch; Arrow's lists hold {MAX_LIST_VALUES}: use more batches")
    flat = pa.array(values.detach().cpu().contiguous().numpy())
    kind = pa.list_(pa.field("item", flat.type, nullable=False))
    return pa.ListArray.from_arrays(pa.array(bounds.to(torch.int32).numpy()), flat, type=kind)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _require_rows(index: Tensor, num_rows: int) -> None:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= num_rows):
        raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {num_rows}")


def _listed(batches: Batches) -> list[pa.RecordBatch | pa.Table]:
    return [batches] if isinstance(batches, pa.RecordBatch | pa.Table) else list(batches)


def _arrays(batches: Batches, name: str) -> list[pa.Array]:
    """The column's arrays, one for each batch or chunk."""
    arrays: list[pa.Array] = []
    given = _listed(batches)
    if not given:
        raise SchemaError(f"no batch to take column {name} from")
    for batch in given:
        if name not in batch.schema.names:
            raise SchemaError(f"{schema_name(batch.schema)}: no column {name}; there are {batch.schema.names}")
        column = batch.column(name)
        arrays.extend(column.chunks if isinstance(column, pa.ChunkedArray) else [column])
    return arrays or [pa.array([], given[0].schema.field(name).type)]


def _refuse_nulls(array: pa.Array, name: str) -> None:
    if array.null_count:
        raise SchemaError(f"column {name} holds {array.null_count} nulls")


def _view(array: pa.Array, name: str) -> Tensor:
    _refuse_nulls(array, name)
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise SchemaError(f"column {name} holds {array.type}, expected numbers")
    return from_dlpack(array)


def _empty(batches: Batches, name: str) -> Tensor:
    kind = _listed(batches)[0].schema.field(name).type
    return _view(pa.array([], kind.value_type), name)
