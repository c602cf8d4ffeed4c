"""The policy's turns within a sample: which of its tokens the policy drew, and which it was given.

A sample begins with its prompt, and from then on turns of the policy and words of an environment alternate. A response
without an environment is one turn. Per-token columns are over the turns' tokens alone, laid end to end.

Invariants:

- The first turn begins where the prompt ends, and a sample ends with a turn: its last token is the policy's.
- Turns rise and do not touch.

Legend: N samples, U turns of all of them, T tokens of all turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from experience.tensors import Batches, ListColumn, list_column


@dataclass(frozen=True)
class Turns:
    """Where in its sample's tokens each turn begins and ends, as list columns with one number a turn."""

    starts: ListColumn
    ends: ListColumn

    @classmethod
    def of_rollouts(cls, rollouts: Batches) -> Turns:
        """The turns of rollouts, or of experience.

        Raises:
            SchemaError: there are no such columns.
        """
        return cls(list_column(rollouts, "turn_starts"), list_column(rollouts, "turn_ends"))

    @classmethod
    def single(cls, num_prompt_tokens_N: Tensor, lengths_N: Tensor) -> Turns:
        """One turn each, from the end of the prompt to the end of the sample."""
        offsets = torch.arange(len(lengths_N) + 1)
        first = torch.zeros(1, dtype=torch.int64)
        return cls(ListColumn((num_prompt_tokens_N,), offsets, first), ListColumn((lengths_N,), offsets, first))

    @property
    def lengths_U(self) -> Tensor:
        """Tokens of each turn, (U,) int64."""
        return self.ends.values.long() - self.starts.values.long()

    @property
    def turn_offsets(self) -> Tensor:
        """Where turns begin and end among the tokens of all turns, (U+1,) int64."""
        lengths_U = self.lengths_U
        return torch.cat([lengths_U.new_zeros(1), lengths_U.cumsum(0)])

    @property
    def lengths_N(self) -> Tensor:
        """Tokens that the policy drew in each sample, (N,) int64."""
        return self.turn_offsets[self.starts.offsets].diff()

    def positions(self, rows: Sequence[int], offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Where, in packed samples, each token of a turn is predicted from: the position just before it.

        >>> samples = {"turn_starts": [[1, 4], [2]], "turn_ends": [[3, 5], [3]]}
        >>> batch = pa.record_batch({name: pa.array(rows, pa.list_(pa.int32())) for name, rows in samples.items()})
        >>> positions, turns = Turns.of_rollouts(batch).positions([0, 1], torch.tensor([0, 5, 8]))
        >>> positions.tolist(), turns.tolist()
        ([0, 1, 3, 6], [0, 3, 4])

        Args:
            rows: those of the pack, in its order.
            offsets: (N+1,), of whole samples in the pack.

        Returns:
            (T,) int64 over the tokens of the rows' turns, and (N+1,) where the rows begin and end among them.

        Raises:
            ValueError: turns do not lie within their sample, or do not rise.
        """
        starts_U, ends_U = self.starts.gather(rows).long(), self.ends.gather(rows).long()
        num_turns_N = self.starts.lengths[torch.as_tensor(rows, dtype=torch.int64)]
        _require_order(starts_U, ends_U, num_turns_N, offsets.diff())
        lengths_U = ends_U - starts_U
        turn_offsets = torch.cat([lengths_U.new_zeros(1), lengths_U.cumsum(0)])
        first_U = torch.repeat_interleave(offsets[:-1], num_turns_N) + starts_U - 1 - turn_offsets[:-1]
        positions_T = torch.arange(int(turn_offsets[-1])) + torch.repeat_interleave(first_U, lengths_U)
        row_ends = torch.cat([num_turns_N.new_zeros(1), num_turns_N.cumsum(0)])
        return positions_T, turn_offsets[row_ends]


def one_turn_each(num_prompt_tokens: Sequence[int], num_tokens: Sequence[int]) -> dict[str, pa.Array]:
    """The columns of ROLLOUT that tell of turns, for samples that are a prompt and one response.

    >>> one_turn_each([2, 3], [5, 4])["turn_ends"].to_pylist()
    [[5], [4]]
    """
    num_rows = len(num_tokens)
    ones, none = np.arange(num_rows + 1, dtype=np.int32), np.zeros(num_rows + 1, np.int32)
    numbers = {"turn_starts": num_prompt_tokens, "turn_ends": num_tokens}
    columns = {
        name: pa.ListArray.from_arrays(pa.array(ones), pa.array(np.asarray(given, np.int32)))
        for name, given in numbers.items()
    }
    return columns | {"environment_rewards": pa.ListArray.from_arrays(pa.array(none), pa.array([], pa.float32()))}


def _require_order(starts_U: Tensor, ends_U: Tensor, num_turns_N: Tensor, lengths_N: Tensor) -> None:
    row_U = torch.repeat_interleave(torch.arange(len(num_turns_N)), num_turns_N)
    new_row_U = torch.cat([row_U.new_ones(1), row_U.diff()])[: len(row_U)] > 0
    before_U = torch.cat([ends_U.new_zeros(1), ends_U])[:-1].masked_fill(new_row_U, 0)
    wrong_U = (starts_U <= before_U) | (ends_U < starts_U) | (ends_U > lengths_N[row_U])
    if bool(wrong_U.any()):
        at = int(wrong_U.nonzero()[0])
        row = int(row_U[at])
        raise ValueError(
            f"row {row} of the pack has {int(lengths_N[row])} tokens and a turn from {int(starts_U[at])} to "
            f"{int(ends_U[at])}, after one that ends at {int(before_U[at])}"
        )
