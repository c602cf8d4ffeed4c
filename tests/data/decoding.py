"""A tokenizer as the tests need it: one that also decodes."""

from __future__ import annotations

from typing import Protocol

from data.tokenizer import Tokenizer


class DecodingTokenizer(Tokenizer, Protocol):
    """What the fixtures make and load."""

    def decode(self, token_ids: list[int]) -> str: ...
