"""The order of rows is pure, even, and the same everywhere."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import Cursor, Mixture, advance, permutation


def splitmix64(state: int) -> int:
    """The reference algorithm over Python's integers: one output of a generator in ``state``."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_permutation_sorts_by_splitmix64() -> None:
    state = 0
    for part in (7, 3):
        state = splitmix64(state ^ part)
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    hashes = [splitmix64((state + (row - 1) * gamma) & mask) for row in range(50)]
    assert permutation(50, 7, 3).tolist() == sorted(range(50), key=hashes.__getitem__)


def test_splitmix64_has_the_published_values() -> None:
    """First outputs of the generator seeded with 1234567, from the authors' C code."""
    outputs = [splitmix64(1234567 + n * 0x9E3779B97F4A7C15) for n in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_permutation_never_changes() -> None:
    """Resumed runs count on it: this value is part of the checkpoint format."""
    assert permutation(10, 0, 0).tolist() == [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]


def test_permutation_looks_random() -> None:
    places = np.array([permutation(20, 5, epoch) for epoch in range(4000)])
    for place in range(20):
        counts = np.bincount(places[:, place], minlength=20)
        chi_squared = ((counts - 200) ** 2 / 200).sum()
        assert chi_squared < 50, f"place {place}: {chi_squared} over 19 degrees of freedom"


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 2**63),
)
def test_every_source_goes_round_evenly(sizes: list[int], data: st.DataObject, seed: int) -> None:
    weights = data.draw(st.none() | st.tuples(*[st.floats(0.1, 10)] * len(sizes)))
    mixture = Mixture(tuple(sizes), weights, seed)
    starts = np.cumsum([0, *sizes])
    drawn = np.concatenate([mixture.epoch(number) for number in range(5)])
    counts = np.bincount(drawn, minlength=starts[-1])
    for source, quota in enumerate(mixture.quotas):
        own = counts[starts[source] : starts[source + 1]]
        assert own.sum() == 5 * quota
        assert own.max() - own.min() <= 1
    again = Mixture(tuple(sizes), weights, seed)
    assert [again.epoch(number).tolist() for number in (4, 0)] == [mixture.epoch(number).tolist() for number in (4, 0)]


@pytest.mark.parametrize(
    ("sizes", "weights", "quotas"),
    [
        ((90, 10), None, (90, 10)),
        ((90, 10), (1, 1), (50, 50)),
        ((10, 10, 10), (1, 1, 1), (10, 10, 10)),
        ((5, 5), (1, 2), (3, 7)),
        ((4, 4), (1, 1000), (1, 7)),
        ((1, 1, 1, 1), (1, 1, 0.001, 0.001), (1, 1, 1, 1)),
        ((1, 1, 1, 1, 1, 1), (1, 1, 1, 0.01, 0.01, 0.01), (1, 1, 1, 1, 1, 1)),
        ((2, 2, 2, 2, 2, 2), (1, 1, 1, 0.01, 0.01, 0.01), (3, 3, 3, 1, 1, 1)),
        ((90, 9, 1), (2, 1, 0.001), (66, 33, 1)),
    ],
)
def test_quotas(sizes: tuple[int, ...], weights: tuple[float, ...] | None, quotas: tuple[int, ...]) -> None:
    assert Mixture(sizes, weights, 0).quotas == quotas


@given(
    sources=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from((1e-9, 0.01, 1.0, 1.0, 3.0, 1e9)) | st.floats(1e-9, 1e9)),
        min_size=1,
        max_size=8,
    ),
)
def test_shares_are_whole_and_follow_the_weights(sources: list[tuple[int, float]]) -> None:
    """Every source has a row, the epoch its length; a smaller weight gives no more, and a whole row is no loss."""
    sizes, weights = (tuple(column) for column in zip(*sources, strict=True))
    total = sum(sizes)
    quotas = Mixture(sizes, weights, 0).quotas
    assert min(quotas) >= 1 and sum(quotas) == total
    assert Mixture(sizes, weights, 7).quotas == quotas
    for one, other in combinations(range(len(sizes)), 2):
        if quotas[one] > quotas[other] + 1:
            assert weights[one] > weights[other]
    exact = [weight / sum(weights) * total for weight in weights]
    if min(exact) >= 1:
        assert all(abs(quota - share) < 1 + 1e-6 for quota, share in zip(quotas, exact, strict=True))
    assert len(Mixture(sizes, weights, 0).epoch(3)) == total


def test_sources_are_interleaved() -> None:
    order = Mixture((500, 500), None, 3).epoch(0)
    first_half = (order[:500] < 500).mean()
    assert 0.4 < first_half < 0.6


def test_interleaving_differs_from_epoch_to_epoch() -> None:
    mixture = Mixture((50, 50), None, 3)
    assert ((mixture.epoch(0) < 50) != (mixture.epoch(1) < 50)).any()


def test_a_source_is_gone_through_in_another_order_each_time() -> None:
    mixture = Mixture((20, 10), (1.0, 2.0), 3)
    first, second = (set(mixture.epoch(number)[mixture.epoch(number) < 20].tolist()) for number in (0, 2))
    assert len(first) == len(second) == 10
    assert first != second


def test_empty_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="every source of a mixture needs a row"):
        Mixture((3, 0), None, 0)
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        Mixture((3, 1), (1.0,), 0)


def test_cursor_goes_round_and_through_json() -> None:
    cursor = advance(Cursor(), 25, 10)
    assert cursor == Cursor(epoch=2, position=5, drawn=25)
    assert Cursor.from_json(cursor.to_json()) == cursor
    assert advance(cursor, 5, 10) == Cursor(epoch=3, position=0, drawn=30)
