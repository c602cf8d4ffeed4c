from __future__ import annotations

import doctest
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from experience import ledger as module
from experience.ledger import MAY_COME_FROM, RETIRED, Ledger, LedgerError, PromptState
from experience.schema import LEDGER, SCORES, SchemaError, check_schema, make_batch
from experience.table import open_table, write_table

STEPS = {
    PromptState.DRAWN: lambda ledger, ids: ledger.requeue(ids),
    PromptState.DISPATCHED: lambda ledger, ids: ledger.dispatch(ids, engine=1, policy_version=2),
    PromptState.GENERATED: lambda ledger, ids: ledger.generate(ids),
    PromptState.SCORED: lambda ledger, ids: ledger.score(ids),
    PromptState.CONSUMED: lambda ledger, ids: ledger.consume(ids, policy_version=3),
    PromptState.DROPPED: lambda ledger, ids: ledger.drop(ids, "too_long"),
}
WAY = [PromptState.DISPATCHED, PromptState.GENERATED, PromptState.SCORED, PromptState.CONSUMED]


def ledger_with_prompt_in(state: PromptState) -> Ledger:
    """A ledger whose prompt 0 is in ``state``."""
    ledger = Ledger()
    ledger.draw([0])
    if state is PromptState.DROPPED:
        ledger.drop([0], "too_long")
    elif state is not PromptState.DRAWN:
        for step in WAY[: WAY.index(state) + 1]:
            STEPS[step](ledger, [0])
    assert ledger.prompts(state) == [0]
    return ledger


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("start", PromptState)
@pytest.mark.parametrize("to", PromptState)
def test_every_pair_of_states(start: PromptState, to: PromptState) -> None:
    in_flight = {PromptState.DRAWN, PromptState.DISPATCHED, PromptState.GENERATED, PromptState.SCORED}
    allowed = {
        (PromptState.DRAWN, PromptState.DISPATCHED),
        (PromptState.DISPATCHED, PromptState.GENERATED),
        (PromptState.GENERATED, PromptState.SCORED),
        (PromptState.SCORED, PromptState.CONSUMED),
        *((state, PromptState.DROPPED) for state in in_flight),
        *((state, PromptState.DRAWN) for state in in_flight - {PromptState.DRAWN}),
    }
    ledger = ledger_with_prompt_in(start)
    if (start, to) in allowed:
        STEPS[to](ledger, [0])
        assert ledger.prompts(to) == [0]
    else:
        before = ledger.balance()
        with pytest.raises(LedgerError, match=f"prompt 0 cannot become {to}: it is {start}"):
            STEPS[to](ledger, [0])
        assert ledger.prompts(start) == [0]
        assert ledger.balance() == before


def test_a_second_consumption_is_refused_before_and_after_the_commit_and_after_a_restart() -> None:
    ledger = ledger_with_prompt_in(PromptState.CONSUMED)
    with pytest.raises(LedgerError, match="prompt 0 cannot become consumed: it is consumed, not scored"):
        ledger.consume([0], policy_version=4)
    ledger.commit()
    for books in (ledger, Ledger.from_arrow(ledger.to_arrow())):
        with pytest.raises(LedgerError, match="it was consumed or dropped before the last commit"):
            books.consume([0], policy_version=4)
        with pytest.raises(LedgerError, match="drew prompt 0 where prompt 1 comes next"):
            books.draw([0])


def test_numbers_have_no_gap() -> None:
    ledger = Ledger()
    ledger.draw(range(3))
    for wrong in ([4], [3, 5], [2], [-1]):
        with pytest.raises(LedgerError, match="comes next"):
            ledger.draw(wrong)
    assert ledger.next_prompt_id == 3
    with pytest.raises(LedgerError, match=r"prompt 3 cannot .* was never drawn \(prompt 3 comes next\)"):
        ledger.dispatch([3], engine=0, policy_version=0)


def test_a_step_happens_for_all_or_for_none() -> None:
    ledger = Ledger()
    ledger.draw(range(3))
    ledger.dispatch([1], engine=0, policy_version=0)
    with pytest.raises(LedgerError, match="prompt 1 cannot become dispatched"):
        ledger.dispatch([0, 1, 2], engine=0, policy_version=0)
    with pytest.raises(LedgerError, match="prompt 2 cannot become dispatched twice in one call"):
        ledger.dispatch([0, 2, 2], engine=0, policy_version=0)
    assert ledger.prompts(PromptState.DRAWN) == [0, 2]
    with pytest.raises(LedgerError, match="dropped for a reason"):
        ledger.drop([0], "")


def test_a_lost_engine_gives_its_prompts_back_in_order() -> None:
    ledger = Ledger()
    ledger.draw(range(6))
    ledger.dispatch([3, 0, 4], engine=1, policy_version=0)
    ledger.dispatch([1, 2], engine=0, policy_version=0)
    ledger.generate([4])
    assert ledger.requeue_engine(1) == [0, 3]
    assert ledger.prompts(PromptState.DRAWN) == [0, 3, 5]
    assert ledger.requeue_engine(1) == []
    ledger.dispatch([0], engine=0, policy_version=1)
    assert [ledger.num_dispatches(prompt) for prompt in (0, 3, 5)] == [2, 1, 0]
    ledger.drop([0], "engine_lost")
    with pytest.raises(LedgerError, match="prompt 0 is not in flight: it is dropped"):
        ledger.num_dispatches(0)
    with pytest.raises(LedgerError, match="prompt 9 is not in flight"):
        ledger.num_dispatches(9)


def test_commit_hands_out_what_is_retired_once() -> None:
    ledger = Ledger()
    ledger.draw(range(4))
    ledger.drop([1], "too_long")
    for step in WAY:
        STEPS[step](ledger, [0, 2])
    rows = ledger.commit()
    check_schema(rows, LEDGER)
    assert rows.to_pylist() == [
        dict(zip(LEDGER.names, row, strict=True))
        for row in [
            (0, "consumed", 1, 1, 3, ""),
            (1, "dropped", -1, 0, -1, "too_long"),
            (2, "consumed", 1, 1, 3, ""),
        ]
    ]
    assert ledger.commit().num_rows == 0
    balance = ledger.balance()
    assert (balance.drawn, balance.in_flight, balance.consumed, balance.dropped) == (4, 1, 2, {"too_long": 1})


def test_state_through_a_file(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.draw(range(5))
    ledger.dispatch([0, 1, 2], engine=3, policy_version=7)
    ledger.generate([1, 2])
    ledger.score([2])
    ledger.drop([4], "too_long")
    write_table(pa.Table.from_batches([ledger.to_arrow()]), tmp_path / "ledger.arrow")
    again = Ledger.from_arrow(open_table(tmp_path / "ledger.arrow"))
    assert again.balance() == ledger.balance()
    assert again.to_arrow().equals(ledger.to_arrow(), check_metadata=True)
    assert again.requeue_engine(3) == [0]
    again.consume([2], policy_version=7)
    assert again.commit().column("prompt_id").to_pylist() == [2, 4]


def test_books_that_do_not_balance_are_refused() -> None:
    ledger = Ledger()
    ledger.draw(range(3))
    state = ledger.to_arrow()
    counts = json.loads(state.schema.metadata[module.COUNTS_KEY])
    assert counts == {"drawn": 3, "consumed": 0, "dropped": {}}
    with pytest.raises(LedgerError, match=r"do not balance: .*drawn=3, in_flight=2"):
        Ledger.from_arrow(state.slice(1))
    del ledger._entries[1]
    for check in (ledger.commit, ledger.to_arrow):
        with pytest.raises(LedgerError, match="do not balance"):
            check()
    with pytest.raises(SchemaError, match="rows without counts"):
        Ledger.from_arrow(Ledger().commit())
    with pytest.raises(SchemaError, match="expected a batch of schema ledger"):
        Ledger.from_arrow(make_batch(SCORES, {"sample_id": [], "score": []}))


def test_state_does_not_grow_with_the_run() -> None:
    sizes = []
    ledger = Ledger()
    for iteration in range(60):
        first = ledger.next_prompt_id
        ledger.draw(range(first, first + 20))
        todo = ledger.prompts(PromptState.DRAWN)[:20]
        ledger.drop(todo[:1], "too_long")
        for step in WAY:
            STEPS[step](ledger, todo[1:])
        ledger.commit()
        ledger.draw([ledger.next_prompt_id])
        ledger.drop([ledger.next_prompt_id - 1], "too_long")
        if iteration >= 10:
            sizes.append(ledger.to_arrow().nbytes + len(ledger.to_arrow().schema.metadata[module.COUNTS_KEY]))
    assert max(sizes) - min(sizes) <= 10  # the digits of the counts
    assert ledger.next_prompt_id == 60 * 21


class Books(RuleBasedStateMachine):
    """Any sequence of calls, right and wrong, against a plain model of a prompt's state."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.model: dict[int, PromptState] = {}

    @rule(num=st.integers(0, 4))
    def draw(self, num: int) -> None:
        first = len(self.model)
        self.ledger.draw(range(first, first + num))
        self.model.update(dict.fromkeys(range(first, first + num), PromptState.DRAWN))

    @rule(to=st.sampled_from(PromptState), seed=st.integers(0, 2**32), size=st.integers(0, 4), wrong=st.booleans())
    def step(self, to: PromptState, seed: int, size: int, wrong: bool) -> None:
        chance = random.Random(seed)
        fitting = [prompt for prompt, state in self.model.items() if state in MAY_COME_FROM[to]]
        among = list(self.model) if wrong else fitting
        ids = chance.sample(among, min(size, len(among)))
        if set(ids) <= set(fitting):
            STEPS[to](self.ledger, ids)
            self.model.update(dict.fromkeys(ids, to))
        else:
            with pytest.raises(LedgerError):
                STEPS[to](self.ledger, ids)

    @rule()
    def commit(self) -> None:
        for row in self.ledger.commit().to_pylist():
            assert self.model[row["prompt_id"]] == row["state"]

    @rule()
    def restart(self) -> None:
        self.ledger = Ledger.from_arrow(self.ledger.to_arrow())

    @invariant()
    def agrees_with_the_model(self) -> None:
        balance = self.ledger.balance()
        states = list(self.model.values())
        assert balance.balances
        assert balance.drawn == len(states)
        assert balance.consumed == states.count(PromptState.CONSUMED)
        assert sum(balance.dropped.values()) == states.count(PromptState.DROPPED)
        for state in set(PromptState) - RETIRED:
            assert self.ledger.prompts(state) == [prompt for prompt, at in self.model.items() if at is state]


TestBooks = Books.TestCase


@given(st.permutations(range(6)))
def test_prompts_come_in_the_order_drawn(order: list[int]) -> None:
    ledger = Ledger()
    ledger.draw(range(6))
    for prompt in order:
        ledger.dispatch([prompt], engine=0, policy_version=0)
    assert ledger.prompts(PromptState.DISPATCHED) == [0, 1, 2, 3, 4, 5]
