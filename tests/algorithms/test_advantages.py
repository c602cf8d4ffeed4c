"""GAE and whitening: values by hand, slow code, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from algorithms.advantages import gae, whiten
from algorithms.errors import ShapeMismatch
from tests.algorithms import slow


def random_samples(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    rewards_T, values_T = (torch.randn(sum(lengths), dtype=torch.float64, generator=source) for _ in range(2))
    return rewards_T, values_T, slow.offsets_of(lengths)


def test_by_hand() -> None:
    """gamma 0.5, lambda 0.5, rewards 0, 0, 8, values 1, 2, 4, and a second sample with reward 1 and value 3.

    delta_2 = 8 + 0 - 4 = 4; delta_1 = 0 + 0.5 * 4 - 2 = 0; delta_0 = 0 + 0.5 * 2 - 1 = 0.
    A_2 = 4; A_1 = 0 + 0.25 * 4 = 1; A_0 = 0 + 0.25 * 1 = 0.25. Returns: 1.25, 3, 8.
    Second: delta = 1 + 0 - 3 = -2 = A, return 1. It must not see the 4 before, nor the first sample the 3 after.
    """
    rewards_T, values_T = torch.tensor([0.0, 0.0, 8.0, 1.0]), torch.tensor([1.0, 2.0, 4.0, 3.0])
    advantages_T, returns_T = gae(rewards_T, values_T, torch.tensor([0, 3, 4]), 0.5, 0.5)
    torch.testing.assert_close(advantages_T, torch.tensor([0.25, 1.0, 4.0, -2.0]))
    torch.testing.assert_close(returns_T, torch.tensor([1.25, 3.0, 8.0, 1.0]))


def test_limits_by_hand() -> None:
    """lambda 1, gamma 1: the advantage is all reward to come less the value. lambda 0: it is delta."""
    rewards_T, values_T = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    offsets = torch.tensor([0, 3])
    advantages_T, returns_T = gae(rewards_T, values_T, offsets, 1.0, 1.0)
    assert advantages_T.tolist() == [-4.0, -15.0, -27.0]
    assert returns_T.tolist() == [6.0, 5.0, 3.0]
    advantages_T, returns_T = gae(rewards_T, values_T, offsets, 1.0, 0.0)
    assert advantages_T.tolist() == [11.0, 12.0, -27.0]
    assert returns_T.tolist() == [21.0, 32.0, 3.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 17, 2, 64, 33, 1, 7], [2] * 9, [4, 0, 3, 0], [16, 15]])
def test_equals_slow_code(lengths: list[int], gamma: float, lam: float) -> None:
    rewards_T, values_T, offsets = random_samples(lengths)
    advantages_T, returns_T = gae(rewards_T, values_T, offsets, gamma, lam)
    expected = [
        slow.gae(rewards.tolist(), values.tolist(), gamma, lam)
        for rewards, values in zip(slow.samples(rewards_T, offsets), slow.samples(values_T, offsets), strict=True)
    ]
    for got, which in ((advantages_T, 0), (returns_T, 1)):
        flat = torch.tensor([number for sample in expected for number in sample[which]], dtype=torch.float64)
        torch.testing.assert_close(got, flat, atol=1e-12, rtol=1e-12)


def test_equals_a_padded_batch() -> None:
    """Right-padded with zeros, the textbook recursion gives the same; what stands in the packed neighbour does not."""
    lengths = [3, 1, 9, 4]
    rewards_T, values_T, offsets = random_samples(lengths)
    longest = max(lengths)
    rewards, values = torch.zeros(4, longest + 1, dtype=torch.float64), torch.zeros(4, longest + 1, dtype=torch.float64)
    for row, (reward, value) in enumerate(
        zip(slow.samples(rewards_T, offsets), slow.samples(values_T, offsets), strict=True)
    ):
        rewards[row, : lengths[row]], values[row, : lengths[row]] = reward, value
    running, columns = torch.zeros(4, dtype=torch.float64), []
    for step in range(longest - 1, -1, -1):
        running = rewards[:, step] + 0.9 * values[:, step + 1] - values[:, step] + 0.9 * 0.8 * running
        columns.append(running)
    padded = torch.stack(columns[::-1], dim=1)
    expected = torch.cat([padded[row, : lengths[row]] for row in range(4)])
    torch.testing.assert_close(gae(rewards_T, values_T, offsets, 0.9, 0.8)[0], expected)


def test_a_sample_does_not_depend_on_the_others() -> None:
    """Bit by bit the same alone, in another order, and beside a sample of NaN."""
    lengths = [3, 1, 40, 7, 12]
    rewards_T, values_T, offsets = (
        part if part.dtype == torch.int64 else part.float() for part in random_samples(lengths)
    )
    whole = slow.samples(gae(rewards_T, values_T, offsets, 1.0, 0.95)[0], offsets)
    rewards, values = slow.samples(rewards_T, offsets), slow.samples(values_T, offsets)
    for row, expected in enumerate(whole):
        alone, _ = gae(rewards[row], values[row], slow.offsets_of([lengths[row]]), 1.0, 0.95)
        assert torch.equal(alone, expected)
    order = [4, 2, 0, 3, 1]
    moved = slow.offsets_of([lengths[row] for row in order])
    shuffled, _ = gae(torch.cat([rewards[r] for r in order]), torch.cat([values[r] for r in order]), moved, 1.0, 0.95)
    for got, row in zip(slow.samples(shuffled, moved), order, strict=True):
        assert torch.equal(got, whole[row])
    rewards_T[4:44] = torch.nan
    beside = slow.samples(gae(rewards_T, values_T, offsets, 1.0, 0.95)[0], offsets)
    assert [bool(part.isnan().any()) for part in beside] == [False, False, True, False, False]
    assert all(torch.equal(beside[row], whole[row]) for row in (0, 1, 3, 4))


def test_inputs_stay_as_they_are() -> None:
    """They may be shared memory that other roles read."""
    rewards_T, values_T, offsets = random_samples([3, 5])
    before = (rewards_T.clone(), values_T.clone())
    gae(rewards_T, values_T, offsets, 0.9, 0.9)
    assert torch.equal(rewards_T, before[0]) and torch.equal(values_T, before[1])


def test_gradients() -> None:
    """Linear in rewards and values; finite differences agree."""
    rewards_T, values_T, offsets = random_samples([3, 1, 4])
    rewards_T.requires_grad_()
    values_T.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, v: gae(r, v, offsets, 0.9, 0.8), (rewards_T, values_T))


def test_no_samples() -> None:
    nothing = torch.zeros(0)
    advantages_T, returns_T = gae(nothing, nothing, torch.zeros(1, dtype=torch.int64), 1.0, 0.95)
    assert advantages_T.shape == returns_T.shape == (0,)


def test_refusals() -> None:
    three = torch.zeros(3)
    with pytest.raises(ShapeMismatch, match=r"'rewards': \(3,\), 'values': \(2,\)"):
        gae(three, torch.zeros(2), torch.tensor([0, 3]), 1.0, 1.0)
    for wrong in ([0, 2], [1, 3], [0, 4], [0, 3, 2, 3]):
        with pytest.raises(ShapeMismatch, match="must rise from 0 to the 3 tokens"):
            gae(three, three, torch.tensor(wrong), 1.0, 1.0)
    with pytest.raises(ShapeMismatch, match=r"offsets are \(N \+ 1,\)"):
        gae(three, three, torch.tensor(3), 1.0, 1.0)


def test_whitening_by_hand() -> None:
    """1, 3, 5, 7: mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5; the unbiased one would be 20 / 3."""
    numbers = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    root = math.sqrt(5)
    expected = torch.tensor([-3 / root, -1 / root, 1 / root, 3 / root], dtype=torch.float64)
    torch.testing.assert_close(whiten(numbers), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(whiten(numbers, shift_mean=False), expected + 4, atol=1e-8, rtol=0)
    assert numbers.tolist() == [1.0, 3.0, 5.0, 7.0]


def test_whitening_equals_slow_code() -> None:
    numbers = 3 + 2 * torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shift_mean in (True, False):
        expected = torch.tensor(slow.whiten(numbers.tolist(), shift_mean), dtype=torch.float64)
        torch.testing.assert_close(whiten(numbers, shift_mean=shift_mean), expected, atol=1e-12, rtol=1e-12)


def test_whitening_of_what_does_not_vary() -> None:
    assert whiten(torch.full((3,), 2.5)).tolist() == [0.0, 0.0, 0.0]
    assert whiten(torch.full((3,), 2.5), shift_mean=False).tolist() == [2.5, 2.5, 2.5]
    assert whiten(torch.tensor([7.0])).tolist() == [0.0]
    assert whiten(torch.zeros(0)).tolist() == []


def test_whitening_of_parts_is_not_whitening_of_the_whole() -> None:
    """Why it is done once, over the global batch."""
    numbers = torch.tensor([0.0, 1.0, 10.0, 30.0], dtype=torch.float64)
    apart = torch.cat([whiten(numbers[:2]), whiten(numbers[2:])])
    assert float((whiten(numbers) - apart).abs().max()) > 0.1
