"""Which sequence goes into which micro-batch, on which rank: pure functions of lengths and seeds.

Invariants:

- Every plan is a function of its arguments alone. Each rank computes the whole plan for itself and takes its own
  part, so ranks agree without talking, and the plan does not depend on which rank asks.
- A unit (one sequence, or the sequences of one comparison) is never split and is planned exactly once.
- All ranks have the same number of packs: with sharded weights each pack is a collective step, so a rank with a
  pack fewer would leave the others waiting for ever.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class PackPlan:
    """``packs[rank][micro]`` holds the indices of the units that ``rank`` runs in its ``micro``-th micro-batch."""

    packs: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_ranks(self) -> int:
        """Ranks that the plan is for."""
        return len(self.packs)

    @property
    def num_packs(self) -> int:
        """Micro-batches on each rank, the same on all."""
        return len(self.packs[0])


def plan_packs(unit_lengths: Sequence[int], num_ranks: int, max_tokens: int) -> PackPlan:
    """Spread units over ranks and micro-batches of at most ``max_tokens`` tokens each.

    The number of micro-batches is what best-fit-decreasing needs (within 11/9 of the fewest possible; Johnson
    1973), rounded up to a multiple of ``num_ranks``. Units are then dealt out longest first to the emptiest pack,
    which evens the packs out, unless that breaks the budget. Packs that run at the same time are of similar size.
    A pack is empty only where there are fewer units than packs. Units stand in a pack in rising order.

    >>> plan_packs([4, 3, 2, 2, 1], num_ranks=2, max_tokens=6).packs
    (((0, 3),), ((1, 2, 4),))

    Raises:
        ValueError: a unit is longer than ``max_tokens`` or holds no token, named by its index.
    """
    if num_ranks < 1 or max_tokens < 1:
        raise ValueError(f"num_ranks and max_tokens must be at least 1, got {num_ranks} and {max_tokens}")
    lengths = [int(length) for length in unit_lengths]
    for unit, length in enumerate(lengths):
        if not 1 <= length <= max_tokens:
            raise ValueError(f"unit {unit} has {length} tokens; a pack takes 1 to {max_tokens} (max_tokens)")
    longest_first = sorted(range(len(lengths)), key=lambda unit: (-lengths[unit], unit))
    packs = _best_fit(lengths, longest_first, max_tokens)
    num_packs = -(-len(packs) // num_ranks) * num_ranks
    packs = _even(lengths, longest_first, num_packs, max_tokens) or _fill_empty(packs, num_packs)
    return PackPlan(_deal(packs, lengths, num_ranks))


def _best_fit(lengths: list[int], longest_first: list[int], max_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: each unit into the fullest pack that still takes it."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for unit in longest_first:
        at = bisect_left(room, (lengths[unit], -1))
        if at == len(room):
            packs.append([unit])
            left, pack = max_tokens - lengths[unit], len(packs) - 1
        else:
            left, pack = room.pop(at)
            packs[pack].append(unit)
            left -= lengths[unit]
        insort(room, (left, pack))
    return packs


def _even(lengths: list[int], longest_first: list[int], num_packs: int, max_tokens: int) -> list[list[int]] | None:
    """Longest unit first into the emptiest pack; None where a pack would exceed the budget."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [(0, pack) for pack in range(num_packs)]
    for unit in longest_first:
        load, pack = loads[0]
        if load + lengths[unit] > max_tokens:
            return None
        packs[pack].append(unit)
        heapq.heapreplace(loads, (load + lengths[unit], pack))
    return packs


def _fill_empty(packs: list[list[int]], num_packs: int) -> list[list[int]]:
    """Add packs up to ``num_packs``; each takes the shortest unit of the pack with most units, if that has several."""
    packs = [list(pack) for pack in packs]
    for _ in range(num_packs - len(packs)):
        donor = max(packs, key=len)
        packs.append([donor.pop()] if len(donor) > 1 else [])
    return packs


def _deal(packs: list[list[int]], lengths: list[int], num_ranks: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Deal packs to ranks: neighbours in size run at the same time, and the ranks' sums stay close."""
    sized = sorted(((sum(lengths[unit] for unit in pack), sorted(pack)) for pack in packs), key=lambda p: (-p[0], p[1]))
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for first in range(0, len(sized), num_ranks):
        emptiest_first = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, (tokens, pack) in zip(emptiest_first, sized[first : first + num_ranks], strict=True):
            ranks[rank].append(tuple(pack))
            totals[rank] += tokens
    return tuple(tuple(rank) for rank in ranks)


def contiguous_split(lengths: Sequence[int], num_parts: int) -> list[range]:
    """Cut rows into ``num_parts`` runs of neighbours of about the same number of tokens.

    Each cut stands at the row boundary nearest to its share of all tokens, so a part has at most
    ``sum(lengths) / num_parts + max(lengths)`` tokens. A part is empty only where there are fewer rows than parts.

    >>> contiguous_split([5, 1, 1, 1, 2], 2)
    [range(0, 1), range(1, 5)]

    Raises:
        ValueError: ``num_parts`` is below 1 or a length is negative.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if num_parts < 1:
        raise ValueError(f"num_parts must be at least 1, got {num_parts}")
    if sizes.size and int(sizes.min()) < 0:
        raise ValueError(f"row {int(sizes.argmin())} has a negative length, {int(sizes.min())}")
    num_rows = len(sizes)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    cuts = [0]
    for part in range(1, num_parts):
        target = float(ends[-1]) * part / num_parts
        cut = int(np.searchsorted(ends, target))
        if cut > 0 and target - float(ends[cut - 1]) <= float(ends[cut]) - target:
            cut -= 1
        cut = max(min(cut, num_rows - (num_parts - part)), cuts[-1] + 1)
        cuts.append(min(cut, num_rows))
    cuts.append(num_rows)
    return [range(start, stop) for start, stop in pairwise(cuts)]


def minibatches(num_rows: int, num_minibatches: int, seed: int, iteration: int, epoch: int) -> list[list[int]]:
    """A permutation of ``range(num_rows)``, cut into ``num_minibatches`` whose sizes differ by at most one.

    A pure function of its arguments, and of the raw stream of PCG64, which numpy holds fixed between releases
    (NEP 19); so a resumed run draws the same minibatches.

    Raises:
        ValueError: fewer rows than minibatches, or a negative seed, iteration or epoch.
    """
    if not 1 <= num_minibatches <= num_rows:
        raise ValueError(f"cannot cut {num_rows} rows into {num_minibatches} minibatches")
    if min(seed, iteration, epoch) < 0:
        raise ValueError(f"seed, iteration and epoch must not be negative, got {seed}, {iteration}, {epoch}")
    stream = np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=(iteration, epoch)))
    order = np.argsort(stream.random_raw(num_rows), kind="stable")
    return [part.tolist() for part in np.array_split(order, num_minibatches)]
