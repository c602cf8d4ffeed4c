"""Random scores and ranks, and what the tests of ranking losses ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.algorithms.slow import offsets_of, samples

NUM_PAIRS = 40
#: Responses of each prompt; the second has ranks without a pair.
SIZES = [4, 3, 2, 9, 1, 5, 7, 2, 4]
NUM_RANKED = len(SIZES) - 2


class Ranked(NamedTuple):
    """Ranked responses of several prompts, and what else the losses over them read."""

    scores_N: Tensor
    ranks_N: Tensor
    offsets: Tensor
    margins_P: Tensor


def doubles(count: int, length: int = NUM_PAIRS, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(length, dtype=torch.float64, generator=source) for _ in range(count)]


def ranked(seed: int = 0) -> Ranked:
    """Prompts of 1 to 9 responses with ties in ranks and, in the first, in scores."""
    source = torch.Generator().manual_seed(seed)
    ranks = [torch.randint(0, size, (size,), generator=source) for size in SIZES]
    ranks[0], ranks[1], ranks[2], ranks[7] = (torch.tensor(part) for part in ([2, 0, 1, 2], [1, 1, 1], [1, 0], [0, 1]))
    scores_N, margins_P = doubles(1, sum(SIZES), seed)[0], doubles(1, len(SIZES), seed + 1)[0].abs()
    scores_N[2] = scores_N[1]
    return Ranked(scores_N, torch.cat(ranks), offsets_of(SIZES), margins_P)


def prompts_of(batch: Ranked, order: list[int], within: Callable[[int], list[int]]) -> Ranked:
    """These prompts in this order, their responses in the order that ``within`` gives for their number."""
    bounds = batch.offsets.tolist()
    orders = [within(bounds[p + 1] - bounds[p]) for p in order]
    rows = [bounds[p] + k for p, places in zip(order, orders, strict=True) for k in places]
    return Ranked(
        batch.scores_N[rows],
        batch.ranks_N[rows],
        offsets_of([len(places) for places in orders]),
        batch.margins_P[order],
    )


def scalars(scores_N: Tensor, offsets: Tensor) -> list[list[Tensor]]:
    return [list(part.unbind()) for part in samples(scores_N, offsets)]


def floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(metric) for name, metric in metrics.items()}


def ranks_of(batch: Ranked) -> list[list[int]]:
    return [part.tolist() for part in samples(batch.ranks_N, batch.offsets)]


def same_order(size: int) -> list[int]:
    return list(range(size))


def reverse_order(size: int) -> list[int]:
    return list(range(size))[::-1]
