"""Rendered text becomes tokens.

Invariants:

- The tokens in front of a response are those that the tokenizer gives for the prompt alone. Where the text as a
  whole is cut otherwise at the border (a token that spans it), the pieces are tokenised apart.
- A mask is 1 on the tokens of a response. The first token of a sequence is predicted from nothing, so it is never
  learnt, whatever its mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from data.chat import Rendered
from data.tokenizer import Tokenizer, bos_prefix, require_eos, special_texts


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence of tokens.

    ``mask`` is 1 on those of a response. ``bytes_each`` is how many bytes of UTF-8 such a token stands for, averaged
    over the text it came from, special tokens counted as nothing.
    """

    tokens: list[int]
    mask: list[int]
    bytes_each: float

    @property
    def num_learnt(self) -> int:
        """Tokens of a response that stand behind another token."""
        return sum(self.mask[1:])

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the response. The mask has to be of one response that ends the row."""
        return len(self.mask) - sum(self.mask)

    def part(self, start: int, stop: int) -> TokenRow:
        """The tokens [start, stop)."""
        return TokenRow(self.tokens[start:stop], self.mask[start:stop], self.bytes_each)

    def cut(self, max_tokens: int) -> TokenRow:
        """The first tokens."""
        return self.part(0, max_tokens)

    def pieces(self, max_tokens: int) -> list[TokenRow]:
        """The row in pieces. Each begins with the last token of the one before, which is not learnt again.

        So every token but the row's first is learnt exactly once.

        Example: tokens 1 to 6 in pieces of 3 are [1, 2, 3], [3, 4, 5], [5, 6].
        """
        if len(self.tokens) <= max_tokens:
            return [self]
        starts = range(0, len(self.tokens) - 1, max(1, max_tokens - 1))
        return [self.part(start, start + max_tokens) for start in starts]


class Encoder:
    """Tokenises rendered text, a batch at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos = bos_prefix(tokenizer)
        texts = sorted(special_texts(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

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
        counts = list(accumulate((len(part) for part in parts), initial=0))
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
        num_bytes = sum(self._num_bytes(item.text[start:end]) for start, end in item.spans)
        return TokenRow(ids, mask, num_bytes / max(1, sum(mask)))

    def _num_bytes(self, text: str) -> int:
        return len((text if self._special is None else self._special.sub("", text)).encode())


def _borders(item: Rendered) -> list[int]:
    """Ends of the pieces that are response or not, from 0 to the length of the text."""
    inner = {border for span in item.spans for border in span}
    return sorted(inner | {0, len(item.text)})


def concatenated(rows: Sequence[TokenRow]) -> TokenRow:
    """Rows as one."""
    mask = [one for row in rows for one in row.mask]
    num_bytes = sum(row.bytes_each * sum(row.mask) for row in rows)
    return TokenRow([token for row in rows for token in row.tokens], mask, num_bytes / max(1, sum(mask)))
