"""The reference's log-probs of a whole data set, computed once and kept.

Invariants:

- The file's name is a digest of the rows, of the model that scored them and of the version of the code that did, so
  what is found under it can be used, by later epochs, resumes and runs alike.
- A run trains on the very rows that were scored, though a source of its own reads them for either.
- Batches and columns go between the roles by reference; this process sees their digests and row counts.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import xxhash

from actors.learner import LearnerActor
from actors.reference import DataReferenceActor
from actors.sequences import SCORING_VERSION
from actors.source import SourceActor, SourceDescription
from cluster.group import Ref, RoleGroup
from data.mismatch import MISMATCH_VERSION
from launch.config import LearnerRunConfig
from launch.errors import DataChanged
from launch.roles import ReferenceRoles, SupervisedRoles

logger = logging.getLogger(__name__)
#: Pairs, or judged responses, scored in one call.
ROWS_AT_A_TIME = 4096
FOLDER = ".reference-logprobs"


def kept_as(data: SourceDescription, model: str) -> str:
    """The name of the file of the log-probs that ``model``, a digest, gives ``data``."""
    versions = f"scored {SCORING_VERSION}"
    if data.kind == "feedback":
        versions += f" mismatched {MISMATCH_VERSION}"
    return f"{xxhash.xxh3_128(f'{data.digest} {model} {versions}'.encode()).hexdigest()}.arrow"


def require_scored(scored: SourceDescription, trained_on: SourceDescription) -> None:
    """Refuse to train on other rows than those that the reference scored: the source reads the files once for each.

    Raises:
        DataChanged: the rows are others, or in another order.
    """
    if scored.digest != trained_on.digest:
        before, now = ("; ".join(str(counts) for counts in data.counts) for data in (scored, trained_on))
        raise DataChanged(
            f"the data have changed while the run began: the reference scored {before}, and training reads {now} "
            f"(digest {scored.digest[:12]} then, {trained_on.digest[:12]} now), so that its log-probs are of other "
            "rows; leave the files and the tokenizer as they are, and start again"
        )


async def score_by_role(roles: ReferenceRoles, model: str, runs: Path) -> Path:
    """Have a reference of its own score the data, or find that it has; returns the file that keeps its log-probs.

    Args:
        model: the reference's digest.
        runs: the folder of all runs, beside which the file is kept.

    Raises:
        ClusterError: a role failed.
    """

    async def score(batch: Ref) -> list[Ref]:
        return [column for column, _ in await roles.reference.columns(DataReferenceActor.score, batch)]

    return await _kept(roles.source, f"{model} full", score, runs)


async def score_by_learner(config: LearnerRunConfig, roles: SupervisedRoles, model: str, runs: Path) -> Path:
    """Have the learner score the data as it starts, or find that it has; returns the file that keeps its log-probs.

    To be called before the learner goes on from a checkpoint: it scores with the weights it has.

    Args:
        model: the digest of the learner as it starts.
        runs: the folder of all runs, beside which the file is kept.

    Raises:
        ClusterError: a role failed.
    """

    async def score(batch: Ref) -> list[Ref]:
        return [column for column, _ in await roles.learner.columns(LearnerActor.score_reference, batch)]

    return await _kept(roles.source, f"{model} {config.learner.tuning.method}", score, runs)


async def _kept(
    source: RoleGroup[SourceActor], model: str, score: Callable[[Ref], Awaitable[list[Ref]]], runs: Path
) -> Path:
    """The file of the source's data and of ``model``; where it is not there, ``score`` makes its parts."""
    description = await source.call_one(0, SourceActor.describe)
    path = runs / FOLDER / kept_as(description, model)
    if path.exists():
        logger.info("the reference's log-probs are at hand: %s", path)
        return path
    columns: list[Ref] = []
    for start in range(0, description.num_rows_in_all, ROWS_AT_A_TIME):
        batch, _ = await source.column_of(0, SourceActor.in_order, start, ROWS_AT_A_TIME)
        columns += await score(batch)
    await source.call_one(0, SourceActor.keep, columns, path)
    return path
