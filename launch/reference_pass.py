"""The reference's log-probs of a whole data set, computed once and kept.

Invariants:

- The file's name is a digest of the rows and of the weights that scored them, so what is found under it can be used,
  by later epochs, resumes and runs alike.
- Batches and columns go between the roles by reference; this process sees their digests and row counts.
"""

from __future__ import annotations

import logging
from pathlib import Path

import xxhash

from actors.learner import LearnerActor
from actors.source import SourceActor
from launch.config import LearnerRunConfig
from launch.roles import SupervisedRoles

logger = logging.getLogger(__name__)
#: Pairs, or judged responses, scored in one call.
ROWS_AT_A_TIME = 4096
FOLDER = ".reference-logprobs"


async def prepare_reference(config: LearnerRunConfig, roles: SupervisedRoles, runs: Path) -> Path:
    """Give the learner its own log-probs as it starts; returns the file that keeps them.

    To be called before the learner goes on from a checkpoint: it scores with the weights it has.

    Args:
        runs: the folder of all runs, beside which the file is kept.

    Raises:
        ClusterError: a role failed.
    """
    description = await roles.source.call_one(0, SourceActor.describe)
    weights = (await roles.learner.call(LearnerActor.weights_digest))[0]
    key = xxhash.xxh3_128(f"{description.digest} {weights} {config.learner.tuning.method}".encode()).hexdigest()
    path = runs / FOLDER / f"{key}.arrow"
    if path.exists():
        logger.info("the reference's log-probs are at hand: %s", path)
    else:
        await _score(roles, description.num_rows_in_all, path)
    await roles.learner.call(LearnerActor.use_reference, path)
    return path


async def _score(roles: SupervisedRoles, num_rows: int, path: Path) -> None:
    columns = []
    for start in range(0, num_rows, ROWS_AT_A_TIME):
        batch, _ = await roles.source.column_of(0, SourceActor.in_order, start, ROWS_AT_A_TIME)
        columns += [column for column, _ in await roles.learner.columns(LearnerActor.score_reference, batch)]
    await roles.source.call_one(0, SourceActor.keep, columns, path)
