from __future__ import annotations

import doctest
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experience import packing
from experience.packing import PackPlan, contiguous_split, minibatches, plan_packs

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


def loads(plan: PackPlan, lengths: list[int]) -> list[list[int]]:
    return [[sum(lengths[unit] for unit in pack) for pack in rank] for rank in plan.packs]


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(packing).failed == 0


@given(LENGTHS, st.integers(1, 7), st.integers(100, 400))
def test_plan_covers_every_unit_once_within_the_budget(lengths: list[int], num_ranks: int, max_tokens: int) -> None:
    plan = plan_packs(lengths, num_ranks, max_tokens)
    assert Counter(unit for rank in plan.packs for pack in rank for unit in pack) == Counter(range(len(lengths)))
    assert plan.num_ranks == num_ranks
    assert {len(rank) for rank in plan.packs} == {plan.num_packs}
    assert all(load <= max_tokens for rank in loads(plan, lengths) for load in rank)
    assert all(list(pack) == sorted(pack) for rank in plan.packs for pack in rank)
    assert plan == plan_packs(lengths, num_ranks, max_tokens)


@given(LENGTHS, st.integers(1, 7), st.integers(100, 400))
def test_number_of_packs_is_near_the_fewest(lengths: list[int], num_ranks: int, max_tokens: int) -> None:
    plan = plan_packs(lengths, num_ranks, max_tokens)
    fewest = -(-sum(lengths) // max_tokens)
    # Johnson: at most 11/9 of the fewest packs, and the fewest is at most one over twice the tokens' share.
    assert plan.num_packs * num_ranks <= 11 / 9 * (2 * fewest + 1) + 1 + num_ranks
    num_empty = sum(not pack for rank in plan.packs for pack in rank)
    assert num_empty == max(0, plan.num_packs * num_ranks - len(lengths))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 5))
def test_ranks_are_balanced(lengths: list[int], num_ranks: int) -> None:
    plan = plan_packs(lengths, num_ranks, 200)
    totals = [sum(rank) for rank in loads(plan, lengths)]
    assert max(totals) - min(totals) <= 200
    per_micro = list(zip(*loads(plan, lengths), strict=True))
    assert all(min(now) >= max(later) for now, later in pairwise(per_micro))


def test_plan_of_two_hundred_units_is_even() -> None:
    lengths = [(37 * i) % 97 + 3 for i in range(200)]
    plan = plan_packs(lengths, 4, 600)
    every = [load for rank in loads(plan, lengths) for load in rank]
    assert max(every) - min(every) < 20
    totals = [sum(rank) for rank in loads(plan, lengths)]
    assert max(totals) / min(totals) < 1.02


def test_full_packs_are_found_where_even_dealing_overflows() -> None:
    # Dealt to the emptiest of two packs: 7 + 2 and 6 + 3, and the last 2 fits neither. 7 + 3 and 6 + 2 + 2 does.
    assert packing._even([2, 2, 3, 6, 7], [4, 3, 2, 0, 1], 2, 10) is None
    assert plan_packs([2, 2, 3, 6, 7], 1, 10).packs == (((0, 1, 3), (2, 4)),)


def test_fallback_leaves_no_pack_empty_while_a_pack_has_two() -> None:
    assert packing._fill_empty([[0, 3, 4], [1, 2]], 4) == [[0], [1, 2], [4], [3]]
    assert packing._fill_empty([[0], [1]], 3) == [[0], [1], []]


def test_where_even_dealing_overflows_a_rank_still_gets_no_empty_pack() -> None:
    # Best fit needs 7 packs, two ranks make it 8, and dealing to the emptiest of 8 overflows.
    lengths = [45, 45, 44, 33, 40, 29, 34, 35, 47, 27, 50, 31, 49, 43, 37, 35, 32]
    longest_first = sorted(range(17), key=lambda unit: (-lengths[unit], unit))
    assert len(packing._best_fit(lengths, longest_first, 100)) == 7
    assert packing._even(lengths, longest_first, 8, 100) is None
    plan = plan_packs(lengths, 2, 100)
    assert plan.num_packs == 4
    assert all(pack for rank in plan.packs for pack in rank)


def test_the_larger_pack_goes_to_the_rank_with_less() -> None:
    assert loads(plan_packs([6, 5, 4, 3], 2, 6), [6, 5, 4, 3]) == [[6, 3], [5, 4]]


def test_no_units_and_more_ranks_than_units() -> None:
    assert plan_packs([], 3, 10).packs == ((), (), ())
    assert plan_packs([], 3, 10).num_packs == 0
    assert plan_packs([4], 3, 10).packs == (((0,),), ((),), ((),))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 11], r"unit 1 has 11 tokens; a pack takes 1 to 10"), ([3, 2, 0], r"unit 2 has 0 tokens")],
)
def test_a_unit_that_cannot_be_packed_is_named(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_packs(lengths, 2, 10)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_split_is_contiguous_and_balanced(lengths: list[int], num_parts: int) -> None:
    parts = contiguous_split(lengths, num_parts)
    assert len(parts) == num_parts
    assert [row for part in parts for row in part] == list(range(len(lengths)))
    assert sum(len(part) == 0 for part in parts) == max(0, num_parts - len(lengths))
    for part in parts:
        tokens = sum(lengths[row] for row in part)
        assert tokens <= sum(lengths) / num_parts + max(lengths, default=0)


def test_split_by_hand() -> None:
    assert contiguous_split([1, 1, 1, 1], 2) == [range(2), range(2, 4)]
    assert contiguous_split([9, 1, 1, 1, 9], 3) == [range(1), range(1, 4), range(4, 5)]
    assert contiguous_split([], 2) == [range(0), range(0)]
    with pytest.raises(ValueError, match="row 1 has a negative length, -2"):
        contiguous_split([1, -2], 2)


@given(st.integers(1, 50), st.data())
def test_minibatches_are_a_permutation(num_rows: int, data: st.DataObject) -> None:
    num_minibatches = data.draw(st.integers(1, num_rows))
    parts = minibatches(num_rows, num_minibatches, seed=3, iteration=1, epoch=0)
    assert sorted(row for part in parts for row in part) == list(range(num_rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts) == num_minibatches


def test_minibatches_depend_on_each_of_seed_iteration_and_epoch() -> None:
    drawn = {
        tuple(map(tuple, minibatches(20, 2, *key)))
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0), (0, 1, 1)]
    }
    assert len(drawn) == 6
    # Fixed for good: a resumed run must draw what the run before it would have drawn.
    assert minibatches(8, 2, seed=7, iteration=3, epoch=1) == [[2, 7, 0, 6], [5, 4, 1, 3]]


def test_minibatches_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="cannot cut 2 rows into 3"):
        minibatches(2, 3, 0, 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        minibatches(2, 1, -1, 0, 0)
