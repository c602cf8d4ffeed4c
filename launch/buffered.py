"""The buffered experience of a checkpoint: scored samples that generation, running ahead, has ready for training.

Invariants:

- What is kept is whole iterations, the next one first and without a gap. Of an iteration that is not complete nothing
  is kept: its prompts are generated again under the same ids.
- The source role reads and writes the files; this process hands it references.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from actors.source import SourceActor
from cluster.group import Ref, RoleGroup
from experience.buffer import BufferState

STATE_FILE = "buffer.json"
SCORES_PREFIX = "scores-"


@dataclass(frozen=True)
class Scored:
    """A slice with every column, ready for credit. Each column is one reference a scoring rank, in row order.

    A column of a role that the run lacks has no references. Scores are by the names that they travel under
    (``actors.score_columns``).
    """

    rollout: Ref
    ref_logprobs: list[Ref]
    values: list[Ref]
    scores: dict[str, list[Ref]]
    policy_logprobs: list[Ref]
    baseline_scores: list[Ref] = field(default_factory=list)


_OTHERS = tuple(column.name for column in fields(Scored) if column.name not in ("rollout", "scores"))


def complete_iterations(state: BufferState, payloads: Sequence[Scored]) -> tuple[BufferState, list[Scored]]:
    """An exported buffer without the iterations that are not complete, and what comes behind them."""
    num_rows = Counter[int]()
    for chunk in state["chunks"]:
        num_rows[chunk["iteration"]] += chunk["num_rows"]
    end = state["version"]
    while num_rows[end] == state["batch_rows"]:
        end += 1
    pairs = zip(state["chunks"], payloads, strict=True)
    kept = [(chunk, payload) for chunk, payload in pairs if chunk["iteration"] < end]
    whole = BufferState(version=state["version"], batch_rows=state["batch_rows"], chunks=[chunk for chunk, _ in kept])
    return whole, [payload for _, payload in kept]


def buffered_prompts(state: BufferState) -> set[int]:
    """The prompts whose samples a state holds."""
    return {prompt for chunk in state["chunks"] for prompt in chunk["prompt_ids"]}


async def keep_buffered(
    source: RoleGroup[SourceActor], state: BufferState, payloads: Sequence[Scored], folder: Path
) -> None:
    """Write every column of every slice into a file of its own, and the state beside them.

    Raises:
        ClusterError: the source role could not.
        OSError: the state could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, payload in enumerate(payloads):
        for name, parts in _columns(payload).items():
            if parts:
                await source.call_one(0, SourceActor.keep, parts, _file(folder, number, name))
    (folder / STATE_FILE).write_text(json.dumps(state))


async def read_buffered(source: RoleGroup[SourceActor], folder: Path) -> tuple[BufferState, list[Scored]]:
    """What ``keep_buffered`` wrote, its columns in the object store.

    Raises:
        ClusterError: the source role could not read a file.
    """
    state: BufferState = json.loads((folder / STATE_FILE).read_text())

    async def column(number: int, name: str) -> list[Ref]:
        file = _file(folder, number, name)
        return [(await source.column_of(0, SourceActor.kept, file))[0]] if file.exists() else []

    payloads = []
    for number in range(len(state["chunks"])):
        (rollout,) = await column(number, "rollout")
        kept = sorted(_name(file) for file in folder.glob(_file(folder, number, f"{SCORES_PREFIX}*").name))
        scores = {name.removeprefix(SCORES_PREFIX): await column(number, name) for name in kept}
        others = {name: await column(number, name) for name in _OTHERS}
        payloads.append(Scored(rollout, scores=scores, **others))
    return state, payloads


def _columns(payload: Scored) -> dict[str, list[Ref]]:
    """Every column by the name of its file."""
    scores = {f"{SCORES_PREFIX}{name}": parts for name, parts in payload.scores.items()}
    return {"rollout": [payload.rollout], **scores, **{name: getattr(payload, name) for name in _OTHERS}}


def _name(file: Path) -> str:
    return file.stem.partition("-")[2]


def _file(folder: Path, number: int, name: str) -> Path:
    return folder / f"{number:06d}-{name}.arrow"
