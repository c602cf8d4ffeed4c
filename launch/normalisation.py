"""Normalising a trained reward model: what its scores are measured on, and the model that is exported.

Invariant: what is measured on is drawn before training, so that it is known to be there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from actors.learner import LearnerActor
from actors.source import SourceActor
from cluster.group import Ref
from launch.config import LearnerRunConfig, RewardModelRunConfig
from launch.errors import CheckpointError
from launch.paths import resolve_data
from launch.roles import SupervisedRoles
from launch.rundir import RunDir

NORMALISATION_FILE = "normalisation.json"


async def draw_measured(config: LearnerRunConfig, roles: SupervisedRoles) -> Ref | None:
    """The rows that a reward model is normalised on; none where it is not.

    Raises:
        ClusterError: the source failed: the rows cannot be read, or there are none.
    """
    if not isinstance(config, RewardModelRunConfig) or config.normalise is None:
        return None
    settings = config.normalise
    if not settings.data:
        return (await roles.source.column_of(0, SourceActor.chosen, settings.max_rows))[0]
    data = resolve_data(settings.data_config(config.data))
    return (await roles.source.column_of(0, SourceActor.examples_of, data, settings.max_rows))[0]


async def export_learner(
    config: LearnerRunConfig, roles: SupervisedRoles, measured: Ref | None, run_dir: RunDir
) -> None:
    """Export what was learnt, normalised on ``measured`` where that is given.

    Raises:
        ClusterError: the learner failed.
    """
    await _export(config, roles, measured, run_dir.model, run_dir.path / NORMALISATION_FILE)
    if config.learner.tuning.has_adapter:
        await roles.learner.call(LearnerActor.export_adapter, run_dir.adapter)


async def export_best(
    config: LearnerRunConfig, roles: SupervisedRoles, measured: Ref | None, checkpoint: Path, run_dir: RunDir
) -> None:
    """Export the model of the best checkpoint as ``export_learner`` does; the learner has its weights from then on.

    Raises:
        CheckpointError: somebody has removed the checkpoint.
        ClusterError: the learner failed.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}, the best checkpoint, is gone, so that its model cannot be exported")
    await roles.learner.call(LearnerActor.load, checkpoint / "learner")
    await _export(config, roles, measured, run_dir.best, run_dir.path / f"best_{NORMALISATION_FILE}")


async def _export(
    config: LearnerRunConfig, roles: SupervisedRoles, measured: Ref | None, place: Path, told: Path
) -> None:
    mapped = None
    if measured is not None and isinstance(config, RewardModelRunConfig) and config.normalise is not None:
        unit_std = config.normalise.by == "policy_samples"
        mapped = (await roles.learner.call(LearnerActor.measure_scores, measured, unit_std))[0]
        text = json.dumps({"by": config.normalise.by, **asdict(mapped)}, indent=2)
        told.write_text(text + "\n")
    await roles.learner.call(LearnerActor.export, place, mapped)
