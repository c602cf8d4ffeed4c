"""The books of a run: where every prompt is that was ever drawn.

    draw        dispatch          generate         score           consume(version)
     |  drawn ----------> dispatched -------> generated -----> scored --------------> consumed
     |    ^                   |                   |              |
     |    +------------------ requeue (what had been computed is lost) --+
     |
     +--- drawn, dispatched, generated, scored ----- drop(reason) -------------------> dropped

Invariants:

- A draw numbers prompts 0, 1, 2, ... without a gap and never twice, so the number of draws is the next number.
- ``drawn = in flight + consumed + dropped``, each counted on its own, and compared at each commit.
- Consumed and dropped are final: no prompt is trained on twice. This holds for prompts that the ledger has
  forgotten too, since their numbers are below the next one and they are not in flight.
- A call over several prompts happens for all of them or, where one may not make the step, for none.
- Memory and checkpoint are bounded by the prompts in flight and those retired since the last commit: a commit
  hands the retired rows out and keeps their counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from experience.schema import LEDGER, SchemaError, check_schema, make_batch

COUNTS_KEY = b"troupe.ledger_counts"


class LedgerError(RuntimeError):
    """A step that a prompt may not make, or books that do not balance."""


class PromptState(StrEnum):
    """Where a prompt is."""

    DRAWN = "drawn"
    DISPATCHED = "dispatched"
    GENERATED = "generated"
    SCORED = "scored"
    CONSUMED = "consumed"
    DROPPED = "dropped"


RETIRED = frozenset({PromptState.CONSUMED, PromptState.DROPPED})

#: From which states a prompt may come into a state.
MAY_COME_FROM: dict[PromptState, frozenset[PromptState]] = {
    PromptState.DRAWN: frozenset({PromptState.DISPATCHED, PromptState.GENERATED, PromptState.SCORED}),
    PromptState.DISPATCHED: frozenset({PromptState.DRAWN}),
    PromptState.GENERATED: frozenset({PromptState.DISPATCHED}),
    PromptState.SCORED: frozenset({PromptState.GENERATED}),
    PromptState.CONSUMED: frozenset({PromptState.SCORED}),
    PromptState.DROPPED: frozenset(PromptState) - RETIRED,
}


@dataclass(frozen=True)
class Balance:
    """Prompts by where they are. ``dropped`` by reason."""

    drawn: int
    in_flight: int
    consumed: int
    dropped: dict[str, int]

    @property
    def balances(self) -> bool:
        """Whether every prompt drawn is somewhere."""
        return self.drawn == self.in_flight + self.consumed + sum(self.dropped.values())


@dataclass(slots=True)
class _Entry:
    state: PromptState = PromptState.DRAWN
    engine: int = -1
    num_dispatches: int = 0
    policy_version: int = -1
    reason: str = ""


class Ledger:
    """Keeps the books. Not thread-safe: it belongs to the driver's event loop.

    >>> ledger = Ledger()
    >>> ledger.draw([0, 1]); ledger.dispatch([0, 1], engine=0, policy_version=0)
    >>> ledger.generate([0]); ledger.score([0]); ledger.consume([0], policy_version=0)
    >>> ledger.requeue_engine(0)
    [1]
    >>> ledger.balance()
    Balance(drawn=2, in_flight=1, consumed=1, dropped={})
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._next_prompt_id = 0
        self._num_consumed = 0
        self._num_dropped: Counter[str] = Counter()

    @property
    def next_prompt_id(self) -> int:
        """The number that the next prompt drawn must have; so many have been drawn."""
        return self._next_prompt_id

    @property
    def num_in_flight(self) -> int:
        """Prompts that are neither consumed nor dropped."""
        return sum(entry.state not in RETIRED for entry in self._entries.values())

    def prompts(self, *states: PromptState) -> list[int]:
        """Prompts in one of ``states``, in the order they were drawn."""
        return [prompt for prompt, entry in self._entries.items() if entry.state in states]

    def num_dispatches(self, prompt_id: int) -> int:
        """How often a prompt in flight was handed to an engine, the lost times included.

        Raises:
            LedgerError: the prompt is not in flight.
        """
        entry = self._entries.get(prompt_id)
        if entry is None or entry.state in RETIRED:
            raise LedgerError(f"prompt {prompt_id} is not in flight: it {self._whereabouts(prompt_id)}")
        return entry.num_dispatches

    def draw(self, prompt_ids: Iterable[int]) -> None:
        """Enter prompts that came from the data.

        Raises:
            LedgerError: their numbers do not continue those drawn before.
        """
        drawn = list(prompt_ids)
        expected = range(self._next_prompt_id, self._next_prompt_id + len(drawn))
        for prompt, wanted in zip(drawn, expected, strict=True):
            if prompt != wanted:
                raise LedgerError(f"drew prompt {prompt} where prompt {wanted} comes next")
        self._entries.update((prompt, _Entry()) for prompt in expected)
        self._next_prompt_id += len(drawn)

    def dispatch(self, prompt_ids: Iterable[int], *, engine: int, policy_version: int) -> None:
        """Hand prompts to an engine (its rank) that has the weights of ``policy_version``. Raises: LedgerError."""
        for entry in self._step(prompt_ids, PromptState.DISPATCHED):
            entry.engine, entry.policy_version = engine, policy_version
            entry.num_dispatches += 1

    def generate(self, prompt_ids: Iterable[int]) -> None:
        """All samples of these prompts have come from the engine. Raises: LedgerError."""
        self._step(prompt_ids, PromptState.GENERATED)

    def score(self, prompt_ids: Iterable[int]) -> None:
        """All columns of these prompts' samples are there. Raises: LedgerError."""
        self._step(prompt_ids, PromptState.SCORED)

    def consume(self, prompt_ids: Iterable[int], *, policy_version: int) -> None:
        """The optimizer has learnt from these prompts, starting at ``policy_version``. Final. Raises: LedgerError."""
        entries = self._step(prompt_ids, PromptState.CONSUMED)
        for entry in entries:
            entry.policy_version = policy_version
        self._num_consumed += len(entries)

    def drop(self, prompt_ids: Iterable[int], reason: str) -> None:
        """Give prompts up, for a reason out of a small fixed set: reasons are counted. Final.

        Raises:
            LedgerError: a prompt is not in flight, or there is no reason.
        """
        if not reason:
            raise LedgerError("a prompt is dropped for a reason, got none")
        entries = self._step(prompt_ids, PromptState.DROPPED)
        for entry in entries:
            entry.reason = reason
        self._num_dropped[reason] += len(entries)

    def requeue(self, prompt_ids: Iterable[int]) -> None:
        """Back to drawn: whatever was computed for these prompts is lost. Raises: LedgerError."""
        for entry in self._step(prompt_ids, PromptState.DRAWN):
            entry.engine = entry.policy_version = -1

    def requeue_engine(self, engine: int) -> list[int]:
        """Requeue what a lost engine was generating; returns these prompts."""
        lost = [
            prompt
            for prompt, entry in self._entries.items()
            if entry.state is PromptState.DISPATCHED and entry.engine == engine
        ]
        self.requeue(lost)
        return lost

    def balance(self) -> Balance:
        """The books as they stand."""
        dropped = {reason: count for reason, count in sorted(self._num_dropped.items()) if count}
        return Balance(self._next_prompt_id, self.num_in_flight, self._num_consumed, dropped)

    def commit(self) -> pa.RecordBatch:
        """Check the books, forget the prompts retired since the last commit, and return their rows (LEDGER).

        Raises:
            LedgerError: the books do not balance.
        """
        self._require_balance()
        retired = {prompt: entry for prompt, entry in self._entries.items() if entry.state in RETIRED}
        self._entries = {prompt: entry for prompt, entry in self._entries.items() if entry.state not in RETIRED}
        return _rows(retired)

    def to_arrow(self) -> pa.RecordBatch:
        """The whole state for a checkpoint: rows of LEDGER, and counts in the schema's metadata.

        Raises:
            LedgerError: the books do not balance.
        """
        self._require_balance()
        counts = {"drawn": self._next_prompt_id, "consumed": self._num_consumed, "dropped": dict(self._num_dropped)}
        rows = _rows(self._entries)
        return rows.replace_schema_metadata({**rows.schema.metadata, COUNTS_KEY: json.dumps(counts).encode()})

    @classmethod
    def from_arrow(cls, state: pa.RecordBatch | pa.Table) -> Ledger:
        """The ledger whose ``to_arrow`` gave ``state``.

        Raises:
            SchemaError: not a ledger's state.
            LedgerError: its books do not balance.
        """
        check_schema(state, LEDGER)
        stored = (state.schema.metadata or {}).get(COUNTS_KEY)
        if stored is None:
            raise SchemaError("ledger: rows without counts; a checkpoint is what to_arrow gives, not what commit gives")
        counts = json.loads(stored)
        ledger = cls()
        for row in state.to_pylist():
            prompt = row.pop("prompt_id")
            ledger._entries[prompt] = _Entry(**{**row, "state": PromptState(row["state"])})
        ledger._next_prompt_id, ledger._num_consumed = counts["drawn"], counts["consumed"]
        ledger._num_dropped = Counter(counts["dropped"])
        ledger._require_balance()
        return ledger

    def _step(self, prompt_ids: Iterable[int], to: PromptState) -> list[_Entry]:
        """Move prompts into a state, all or none, and return their entries."""
        prompts = list(prompt_ids)
        allowed = MAY_COME_FROM[to]
        entries: list[_Entry] = []
        for prompt in prompts:
            entry = self._entries.get(prompt)
            if entry is None or entry.state not in allowed:
                wanted = " or ".join(state for state in PromptState if state in allowed)
                raise LedgerError(f"prompt {prompt} cannot become {to}: it {self._whereabouts(prompt)}, not {wanted}")
            entries.append(entry)
        if len(set(prompts)) != len(prompts):
            twice = Counter(prompts).most_common(1)[0][0]
            raise LedgerError(f"prompt {twice} cannot become {to} twice in one call")
        for entry in entries:
            entry.state = to
        return entries

    def _whereabouts(self, prompt: int) -> str:
        entry = self._entries.get(prompt)
        if entry is not None:
            return f"is {entry.state}"
        if 0 <= prompt < self._next_prompt_id:
            return "was consumed or dropped before the last commit"
        return f"was never drawn (prompt {self._next_prompt_id} comes next)"

    def _require_balance(self) -> None:
        if not (balance := self.balance()).balances:
            raise LedgerError(f"the books do not balance: {balance}")


def _rows(entries: dict[int, _Entry]) -> pa.RecordBatch:
    held = entries.values()
    columns = {
        "prompt_id": list(entries),
        "state": [str(entry.state) for entry in held],
        "engine": [entry.engine for entry in held],
        "num_dispatches": [entry.num_dispatches for entry in held],
        "policy_version": [entry.policy_version for entry in held],
        "reason": [entry.reason for entry in held],
    }
    return make_batch(LEDGER, columns)
