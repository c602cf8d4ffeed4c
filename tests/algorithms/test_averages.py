"""The moving average of weights: how far it comes, and why it is in float32."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from algorithms.averages import effective_weight, update_averages_
from algorithms.errors import AlgorithmError, ShapeMismatch

DECAY = 0.992


def test_by_hand() -> None:
    """0.75 * 8 + 0.25 * 4 = 7, then 0.75 * 7 + 0.25 * 4 = 6.25, in the tensor that was given."""
    average = torch.tensor([8.0])
    update_averages_([average], [torch.tensor([4.0])], 0.75)
    assert average.item() == 7.0
    update_averages_([average], [torch.tensor([4.0])], 0.75)
    assert average.item() == 6.25


@pytest.mark.parametrize(("num_updates", "expected"), [(0, 0.0), (1, 0.008), (10, 0.0772), (100, 0.5521), (2000, 1.0)])
def test_towards_a_constant(num_updates: int, expected: float) -> None:
    """From 0 towards 1, the average is the effective weight."""
    average = torch.zeros(3, dtype=torch.float64)
    for _ in range(num_updates):
        update_averages_([average], [torch.ones(3)], DECAY)
    assert effective_weight(DECAY, num_updates) == pytest.approx(expected, abs=5e-5)
    assert average.tolist() == pytest.approx([effective_weight(DECAY, num_updates)] * 3)


def test_equals_slow_code() -> None:
    """The weighted sum of all weights there were: (1 - d) d^(n - i) of the i-th, d^n of the start."""
    source = torch.Generator().manual_seed(0)
    start, *history = (torch.randn(5, dtype=torch.float64, generator=source) for _ in range(21))
    average = start.clone()
    for weights in history:
        update_averages_([average], [weights], 0.9)
    expected = 0.9**20 * start + sum((0.1 * 0.9 ** (19 - i) * w for i, w in enumerate(history)), torch.zeros(5))
    torch.testing.assert_close(average, expected)


def test_float32_moves_where_bfloat16_freezes() -> None:
    """From 255 towards 254, which are neighbours in bfloat16: 0.008 of the way rounds back, for ever."""
    frozen, weights = torch.tensor([255.0], dtype=torch.bfloat16), torch.tensor([254.0], dtype=torch.bfloat16)
    average = frozen.float()
    for _ in range(500):
        frozen.lerp_(weights, 1 - DECAY)
        update_averages_([average], [weights], DECAY)
    assert frozen.item() == 255.0
    assert average.item() == pytest.approx(254 + DECAY**500, abs=1e-3)
    with pytest.raises(AlgorithmError, match=r"an average is kept in torch\.bfloat16, which freezes"):
        update_averages_([frozen], [weights], DECAY)


def test_shards_are_averaged_as_the_whole() -> None:
    """Bit by bit, however parameters are flattened and cut."""
    source = torch.Generator().manual_seed(1)
    average, weights = (torch.randn(6, 7, generator=source) for _ in range(2))
    flat, flat_weights = average.clone().flatten(), weights.flatten()
    shards = [(flat[a:b], flat_weights[a:b]) for a, b in pairwise([0, 5, 5, 33, 42])]
    update_averages_([average], [weights], DECAY)
    update_averages_([shard for shard, _ in shards], [shard for _, shard in shards], DECAY)
    assert torch.equal(flat.view(6, 7), average)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_weights_stay(dtype: torch.dtype) -> None:
    weights = torch.randn(100, generator=torch.Generator().manual_seed(2)).to(dtype)
    average = weights.float()
    before = average.clone()
    update_averages_([average], [before.to(dtype)], DECAY)
    assert torch.equal(average, before)


def test_no_decay_copies_and_nothing_is_nothing() -> None:
    average = torch.tensor([3.0])
    update_averages_([average], [torch.tensor([1e30])], 0.0)
    assert average.item() == pytest.approx(1e30)
    update_averages_([], [], DECAY)
    assert effective_weight(0.0, 0) == 0.0 and effective_weight(0.0, 3) == 1.0


def test_no_gradient_is_kept() -> None:
    average, weights = torch.zeros(2), torch.ones(2, requires_grad=True)
    update_averages_([average], [weights], DECAY)
    assert not average.requires_grad


def test_refusals_leave_everything_as_it_was() -> None:
    averages: list[Tensor] = [torch.zeros(2), torch.zeros(3)]
    for weights in ([torch.ones(2)], [torch.ones(2), torch.ones(3, 1)], [torch.ones(3), torch.ones(2)]):
        with pytest.raises(ShapeMismatch, match="they must be the same"):
            update_averages_(averages, weights, DECAY)
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(AlgorithmError, match="from 0 to below 1"):
            update_averages_(averages, averages, decay)
        with pytest.raises(AlgorithmError, match="from 0 to below 1"):
            effective_weight(decay, 1)
    with pytest.raises(AlgorithmError, match="it must be 0 or more"):
        effective_weight(DECAY, -1)
    assert not any(bool(average.any()) for average in averages)
