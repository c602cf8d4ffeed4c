"""Responses behind the prompts of others: what KTO estimates a KL divergence from.

Invariants:

- What stands behind a row's prompt is a function of the rows on its side of the split: not of the seed, the epoch or
  the batch. So a reference scores it once, with the row itself, for all epochs and runs.
- It answers another prompt, unless a long run of rows in the order has the same one.
- It is no longer than the longest row there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.order import Int64s, permutation
from data.table import Column, Tables, Units

#: Of which response stands behind which prompt. To be raised with a change of it: what references scored is then stale.
MISMATCH_VERSION = 1
#: Of the order in which each row takes the response of the next. Neighbours in a file often share a prompt.
_KEY = 0x6B746F
#: Rows that are looked at for another prompt.
MOST_STEPS = 16


class Mismatch:
    """The mismatched sequences of the rows of ``tables``, which are of kind feedback: one row a unit."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._order = permutation(len(tables), _KEY)
        self._place = np.argsort(self._order, kind="stable")
        self._longest = tables.facts.longest

    def sequences(self, rows: Int64s) -> list[Column]:
        """For each of ``rows``, its prompt and the response of another."""
        prompts = [prompt for prompt, _ in _parts(self._tables.take(rows))]
        responses: list[Column] = [prompt[:0] for prompt in prompts]
        left = np.arange(len(rows))
        for step in range(1, MOST_STEPS + 1):
            others = self._order[(self._place[rows[left]] + step) % len(self._order)]
            again = []
            for at, (prompt, response) in zip(left.tolist(), _parts(self._tables.take(others)), strict=True):
                responses[at] = response
                if np.array_equal(prompt, prompts[at]):
                    again.append(at)
            if not again:
                break
            left = np.array(again)
        pairs = zip(prompts, responses, strict=True)
        return [np.concatenate([prompt, response])[: self._longest] for prompt, response in pairs]


def _parts(taken: Units) -> Iterator[tuple[Column, Column]]:
    """Prompt and response of each row."""
    tokens, ends = taken.columns["tokens"], np.cumsum(taken.lengths)
    for end, length, prompt in zip(ends, taken.lengths, taken.columns["num_prompt_tokens"], strict=True):
        yield tokens[end - length : end - length + prompt], tokens[end - length + prompt : end]
