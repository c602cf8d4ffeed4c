"""Batches of comparisons: the responses to one prompt are a unit, which no pack and no rank splits.

Legend: N responses and P prompts of a pack, S response tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from actors.objectives import listed
from actors.packed import EMPTY_ROW
from experience.schema import COMPARISONS, SchemaError, check_schema
from experience.tensors import Batches, PackedRows, list_column, pack, scalar_column


@dataclass(frozen=True)
class ComparisonPack:
    """Whole comparisons laid end to end; ``offsets_P`` (P+1,) delimits their responses.

    ``ranks_N`` are 0 for the best; ``prompt_tokens_N`` and ``sequence_ids_N`` are of each response, and stay on the
    CPU like ``packed_offsets`` (N+1,); ``margins_P`` and ``preferences_P`` are of each comparison; ``ratings_P``
    numbers the names in ``Comparisons.rating_names``.
    """

    packed: PackedRows
    packed_offsets: Tensor
    offsets_P: Tensor
    ranks_N: Tensor
    prompt_tokens_N: Tensor
    sequence_ids_N: Tensor
    margins_P: Tensor
    preferences_P: Tensor
    ratings_P: Tensor

    @property
    def is_empty(self) -> bool:
        """It stands for no comparison, so that a rank without work can take part."""
        return not len(self.ranks_N)


class Comparisons:
    """Columns of a batch of comparisons, as views, and where each comparison begins.

    Raises:
        SchemaError: it is no such batch, or the rows of a comparison are not two or more that stand together, best
            first and with rising sequence ids.
    """

    def __init__(self, rows: Batches) -> None:
        for batch in listed(rows):
            check_schema(batch, COMPARISONS)
        self._tokens = list_column(rows, "tokens")
        self._ranks = scalar_column(rows, "rank").long()
        self._prompt_tokens = scalar_column(rows, "num_prompt_tokens").long()
        self._sequence_ids = scalar_column(rows, "sequence_id")
        self._margins, self._preferences = scalar_column(rows, "margin"), scalar_column(rows, "preference")
        ids = scalar_column(rows, "comparison_id")
        # A comparison that is drawn twice in a row begins again where its sequence ids fall.
        begins = (ids.diff() != 0) | (self._sequence_ids.diff() <= 0)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), begins.nonzero()[:, 0] + 1])
        #: (P+1,) where the responses of each comparison begin.
        self.bounds: list[int] = [*starts.tolist(), len(ids)] if len(ids) else [0]
        self._require_order()
        names = pa.chunked_array([batch.column("rating") for batch in listed(rows)]).combine_chunks()
        encoded = names.dictionary_encode()
        #: The ratings that occur, "" for none.
        self.rating_names: tuple[str, ...] = tuple(encoded.dictionary.to_pylist())
        self._ratings = torch.from_numpy(encoded.indices.to_numpy(zero_copy_only=False).copy()).long()
        lengths = self._tokens.lengths
        self.unit_lengths: list[int] = [
            int(lengths[begin:end].sum()) for begin, end in zip(self.bounds, self.bounds[1:], strict=False)
        ]

    @property
    def num_comparisons(self) -> int:
        """Comparisons of the batch."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> list[int]:
        """Responses of each comparison."""
        return [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def ranks(self) -> Tensor:
        """Of every response of the batch."""
        return self._ranks

    def pack(self, units: Sequence[int], device: torch.device) -> ComparisonPack:
        """Comparisons laid end to end on ``device``; none give the empty pack."""
        rows = [row for unit in units for row in range(self.bounds[unit], self.bounds[unit + 1])]
        sizes = torch.tensor([0, *(self.bounds[unit + 1] - self.bounds[unit] for unit in units)])
        firsts = torch.tensor([self.bounds[unit] for unit in units], dtype=torch.int64)
        at = torch.tensor(rows, dtype=torch.int64)
        packed = pack(self._tokens, rows) if rows else EMPTY_ROW
        return ComparisonPack(
            packed.to(device),
            packed.offsets if rows else torch.zeros(1, dtype=torch.int64),
            sizes.cumsum(0).to(device),
            self._ranks[at].to(device),
            self._prompt_tokens[at],
            self._sequence_ids[at],
            self._margins[firsts].to(device),
            self._preferences[firsts].to(device),
            self._ratings[firsts].to(device),
        )

    def _require_order(self) -> None:
        if not self.num_comparisons:
            raise SchemaError("comparisons: the batch is empty")
        for begin, end in zip(self.bounds, self.bounds[1:], strict=False):
            ranks = self._ranks[begin:end]
            if end - begin < 2 or int(ranks[0]) != 0 or bool((ranks.diff() < 0).any()):
                raise SchemaError(
                    "comparisons: each needs two or more rows that stand together, ranks from 0 (the best) upwards, "
                    f"got ranks {ranks.tolist()} at row {begin}"
                )
