"""Micro-batches: rows of a batch laid end to end, with what is needed at each response token.

Invariant: a rank that has no rows left for a micro-batch runs ``EMPTY_ROW`` with nothing selected, because with
sharded weights every forward and backward is a collective step of all ranks.

Legend: T tokens of a pack, S response tokens of a pack: those that the policy drew, in all its turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from algorithms.logprobs import token_logprobs
from experience.packing import PackPlan, contiguous_split, plan_packs
from experience.tensors import Batches, ListColumn, PackedRows, columns_of, list_column, pack, scalar_column
from experience.turns import Turns

EMPTY_ROW = PackedRows(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))


@dataclass(frozen=True)
class ResponsePack:
    """Whole samples, laid end to end.

    ``positions_S`` is where each response token is predicted from (the position before it) and ``targets_S`` that
    token; ``offsets`` (N+1,) delimits the rows' responses in S.
    """

    packed: PackedRows
    positions_S: Tensor
    targets_S: Tensor
    offsets: Tensor


class Samples:
    """Tokens of a batch and the turns within them, as views.

    Args:
        column: of the tokens. Rows of rollouts say where their turns are; others begin with ``num_prompt_tokens``
            tokens of a prompt, and what follows is one turn.
    """

    def __init__(self, rows: Batches, column: str = "tokens") -> None:
        self.tokens: ListColumn = list_column(rows, column)
        self.lengths: list[int] = self.tokens.lengths.tolist()
        if "turn_starts" in columns_of(rows):
            self._turns = Turns.of_rollouts(rows)
        else:
            self._turns = Turns.single(scalar_column(rows, "num_prompt_tokens"), self.tokens.lengths)
        self.response_lengths: list[int] = self._turns.lengths_N.tolist()

    @property
    def num_rows(self) -> int:
        """Samples."""
        return len(self.lengths)

    def pack(self, rows: Sequence[int], device: torch.device) -> ResponsePack:
        """``rows`` laid end to end on ``device``; no rows give the empty pack."""
        if not rows:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return ResponsePack(EMPTY_ROW.to(device), none, none, torch.zeros(1, dtype=torch.int64))
        packed = pack(self.tokens, rows)
        positions, offsets = self._turns.positions(rows, packed.offsets)
        targets = packed.tokens[positions + 1]
        return ResponsePack(packed.to(device), positions.to(device), targets.to(device), offsets)


def scoring_packs(
    lengths: Sequence[int],
    rank: int,
    num_ranks: int,
    max_tokens: int,
    collective: bool,
    cut_by: Sequence[int] | None = None,
) -> tuple[range, list[tuple[int, ...]]]:
    """This rank's rows, and the packs (of row numbers in the whole batch) that it runs them in.

    Rows go to ranks in runs of neighbours, of even numbers of tokens by ``lengths``, or by ``cut_by`` where several
    columns of a row belong on one rank. Where the forward is ``collective``, empty packs make the ranks even.

    Raises:
        ValueError: a row is longer than ``max_tokens``.
    """
    parts = contiguous_split(cut_by or lengths, num_ranks)

    def plan(part: range) -> PackPlan:
        return plan_packs([lengths[row] for row in part], 1, max_tokens)

    own = parts[rank]
    packs = [tuple(own[unit] for unit in units) for units in plan(own).packs[0]]
    if collective:
        most = max(plan(part).num_packs for part in parts)
        packs += [()] * (most - len(packs))
    return own, packs


def in_row_order(packs: Sequence[Sequence[int]], values: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Tensor]:
    """Per-row pieces of packed results, by ascending row; ``offsets[i]`` delimits the rows in ``values[i]``."""
    pieces: dict[int, Tensor] = {}
    for rows, value, bounds in zip(packs, values, offsets, strict=True):
        if rows:
            pieces.update(zip(rows, torch.split(value, bounds.diff().tolist()), strict=True))
    return [pieces[row] for row in sorted(pieces)]


def response_logprobs(model: nn.Module, pack: ResponsePack, temperature: float) -> Tensor:
    """Log-probs (S,) of a pack's response tokens at the sampling temperature, by a ``CausalLM``."""
    logits_SV = model(pack.packed.tokens, pack.packed.position_ids, pack.positions_S)
    return token_logprobs(logits_SV, pack.targets_S, temperature)
