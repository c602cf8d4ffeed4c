"""Sums by sample, and numbers of samples on their tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from algorithms.errors import ShapeMismatch
from algorithms.packed import sample_means, sample_sums, spread
from tests.algorithms import slow

LENGTHS = [3, 0, 17, 1, 40, 0]


def test_by_hand() -> None:
    offsets = torch.tensor([0, 2, 2, 3])
    assert spread(torch.tensor([1.0, 9.0, 4.0]), offsets).tolist() == [1.0, 1.0, 4.0]
    assert sample_sums(torch.tensor([1.0, 3.0, 5.0]), offsets).tolist() == [4.0, 0.0, 5.0]
    assert sample_means(torch.tensor([1.0, 3.0, 5.0]), offsets).tolist() == [2.0, 0.0, 5.0]
    assert spread(torch.tensor([3, 4]), torch.tensor([0, 1, 2])).tolist() == [3, 4]


def test_equals_slow_code() -> None:
    offsets = slow.offsets_of(LENGTHS)
    values_T = torch.randn(sum(LENGTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = [sum(sample.tolist()) for sample in slow.samples(values_T, offsets)]
    means = [total / max(length, 1) for total, length in zip(sums, LENGTHS, strict=True)]
    torch.testing.assert_close(sample_sums(values_T, offsets), torch.tensor(sums, dtype=torch.float64))
    torch.testing.assert_close(sample_means(values_T, offsets), torch.tensor(means, dtype=torch.float64))
    given = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    assert spread(torch.arange(len(LENGTHS)), offsets).tolist() == given


def test_a_sample_does_not_depend_on_the_others() -> None:
    """Bit by bit the same alone, and beside NaN."""
    offsets = slow.offsets_of(LENGTHS)
    values_T = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(1))
    whole = sample_sums(values_T, offsets)
    for row, sample in enumerate(slow.samples(values_T, offsets)):
        assert torch.equal(sample_sums(sample, slow.offsets_of([LENGTHS[row]]))[0], whole[row])
    values_T[3:20] = torch.nan
    beside = sample_sums(values_T, offsets)
    assert beside.isnan().tolist() == [False, False, True, False, False, False]
    assert torch.equal(beside[3:], whole[3:])


@pytest.mark.parametrize("function", [sample_sums, sample_means])
def test_gradients(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    values_T = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, torch.tensor([0, 2, 2, 6])), (values_T,))


def test_gradients_of_spreading() -> None:
    numbers_N = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(spread(numbers_N, torch.tensor([0, 2, 2, 5])).sum(), numbers_N)
    assert gradient.tolist() == [2.0, 0.0, 3.0]


def test_nothing() -> None:
    none, start = torch.zeros(0), torch.zeros(1, dtype=torch.int64)
    assert spread(none, start).shape == sample_sums(none, start).shape == sample_means(none, start).shape == (0,)


def test_refusals() -> None:
    with pytest.raises(ShapeMismatch, match=r"'numbers': \(3,\), 'lengths': \(2,\)"):
        spread(torch.zeros(3), torch.tensor([0, 1, 2]))
    for wrong in ([1, 2], [0, 3, 2]):
        with pytest.raises(ShapeMismatch, match="must rise from 0"):
            spread(torch.zeros(len(wrong) - 1), torch.tensor(wrong))
    with pytest.raises(ShapeMismatch, match=r"offsets are \(N \+ 1,\)"):
        spread(torch.zeros(1), torch.tensor(1))
    for function in (sample_sums, sample_means):
        with pytest.raises(ShapeMismatch, match="must rise from 0 to the 3 tokens"):
            function(torch.zeros(3), torch.tensor([0, 2]))
        with pytest.raises(ShapeMismatch, match="vectors of one length"):
            function(torch.zeros(3, 1), torch.tensor([0, 3]))
