"""Rendered text becomes tokens, kept flat: one buffer of values and one of offsets, as Arrow has lists.

Invariants:

- The tokens in front of a response are those that the tokenizer gives for the prompt alone. Where the text as a
  whole is cut otherwise at the border (a token that spans it), the pieces are tokenised apart.
- ``loss_mask`` is 1 on a token that is to be predicted from those before it, so it is 0 on the first token of every
  sequence, and its sum is the number of predictions.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data.chat import Rendered
from data.tokenizer import Tokenizer, bos_prefix, require_eos

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence of tokens. ``mask`` is 1 on those of a response."""

    tokens: list[int]
    mask: list[int]

    def cut(self, max_tokens: int) -> TokenRow:
        """The first tokens."""
        return TokenRow(self.tokens[:max_tokens], self.mask[:max_tokens])


class Encoder:
    """Tokenises rendered text, a batch at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos = bos_prefix(tokenizer)

    def encode(self, rendered: Sequence[Rendered]) -> list[TokenRow]:
        """Tokens and mask of each text.

        Example: text ``ab cd`` with span (2, 5), EOS 9 and tokens ``ab`` 3, `` cd`` 4 gives tokens [3, 4, 9] and
        mask [0, 1, 1].
        """
        borders = [_borders(item) for item in rendered]
        texts = [
            piece
            for item, ends in zip(rendered, borders, strict=True)
            for piece in (*(item.text[:end] for end in ends[1:-1]), item.text)
        ]
        ids = iter(self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        rows = []
        for item, ends in zip(rendered, borders, strict=True):
            *prefixes, whole = [next(ids) for _ in ends[1:]]
            counts = [0, *(len(prefix) for prefix in prefixes), len(whole)]
            if any(whole[: len(prefix)] != prefix for prefix in prefixes):
                whole, counts = self._apart(item.text, ends)
            rows.append(self._row(item, ends, whole, counts))
        return rows

    def _apart(self, text: str, ends: list[int]) -> tuple[list[int], list[int]]:
        pieces = [text[start:end] for start, end in pairwise(ends)]
        parts = self._tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        counts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        return [token for part in parts for token in part], counts

    def _row(self, item: Rendered, ends: list[int], ids: list[int], counts: list[int]) -> TokenRow:
        starts = {start for start, _ in item.spans}
        mask = []
        for end, first, last in zip(ends, counts, counts[1:], strict=False):
            mask += [int(end in starts)] * (last - first)
        if item.bos:
            ids, mask = self._bos + ids, [0] * len(self._bos) + mask
        if item.eos:
            ids, mask = [*ids, require_eos(self._tokenizer, "has to end every sequence")], [*mask, 1]
        return TokenRow(ids, mask)


def _borders(item: Rendered) -> list[int]:
    """Ends of the pieces that are response or not, from 0 to the length of the text."""
    inner = {border for span in item.spans for border in span}
    return sorted(inner | {0, len(item.text)})


@dataclass
class TokenStore:
    """Sequences of tokens in flat buffers, growing at the end. 5 bytes a token with a mask, 4 without."""

    with_mask: bool
    _values: array[int] = field(default_factory=lambda: array("i"))
    _mask: array[int] = field(default_factory=lambda: array("B"))
    _offsets: array[int] = field(default_factory=lambda: array("q", [0]))
    origins: list[str] = field(default_factory=list)

    def add(self, row: TokenRow) -> None:
        """Append one sequence."""
        self._values.extend(row.tokens)
        if self.with_mask:
            self._mask.extend(row.mask)
        self._offsets.append(len(self._values))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def finish(self, pack_to: int | None = None) -> TokenTable:
        """The sequences as Arrow; with ``pack_to``, joined and cut anew into that many tokens each.

        What is left at the end of a packing is a shorter sequence; a single token, which predicts nothing, is
        dropped.
        """
        offsets: Int64s = np.asarray(self._offsets, dtype=np.int64)
        values: Int32s = np.asarray(self._values, dtype=np.int32)
        if pack_to is not None:
            total = len(values) - (len(values) % pack_to == 1)
            offsets = np.append(np.arange(0, total, pack_to, dtype=np.int64), np.int64(total))
        mask = None
        if self.with_mask:
            mask = np.asarray(self._mask, dtype=np.uint8)
            mask[offsets[:-1][np.diff(offsets) > 0]] = 0
        return TokenTable(offsets, values, mask, tuple(self.origins))


@dataclass(frozen=True)
class TokenTable:
    """Finished sequences. ``offsets`` (N+1,) int64, ``values`` (T,) int32, ``mask`` (T,) uint8 or none."""

    offsets: Int64s
    values: Int32s
    mask: npt.NDArray[np.uint8] | None
    origins: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.offsets[-1])

    def take(self, rows: Int64s) -> tuple[pa.Array, pa.Array | None]:
        """Tokens as ``list<int32>``, and the mask as ``list<uint8>`` if there is one, of some sequences."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[rows] - ends[:-1], lengths) + np.arange(ends[-1])
        offsets = pa.array(ends.astype(np.int32))
        tokens = pa.ListArray.from_arrays(offsets, pa.array(self.values[places]))
        mask = None if self.mask is None else pa.ListArray.from_arrays(offsets, pa.array(self.mask[places]))
        return tokens, mask


def join(tables: Sequence[TokenTable]) -> TokenTable:
    """One table behind the other."""
    if len(tables) == 1:
        return tables[0]
    starts = np.cumsum([0, *(table.num_tokens for table in tables)])
    offsets = [table.offsets[:-1] + start for table, start in zip(tables, starts, strict=False)]
    masks = [table.mask[: table.num_tokens] for table in tables if table.mask is not None]
    return TokenTable(
        np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
        np.concatenate([table.values[: table.num_tokens] for table in tables]),
        np.concatenate(masks) if masks else None,
        tuple(origin for table in tables for origin in table.origins),
    )
