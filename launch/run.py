"""One run from its configuration to its exported model: opens the folder, starts the roles, lets a driver drive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from actors.critic import CriticActor
from actors.learner import LearnerActor
from actors.policy import PolicyActor
from actors.reference import DataReferenceActor, ReferenceActor
from actors.source import SourceActor
from cluster.session import connect
from launch.checkpoint import CheckpointStore
from launch.config import LearnerRunConfig, OnlineRunConfig, ReferredRunConfig, RunConfig
from launch.data_rules import require_usable
from launch.errors import CheckpointError
from launch.metrics import MetricsWriter
from launch.normalisation import draw_measured, export_best, export_learner
from launch.online import OnlineDriver
from launch.online_state import OnlineState
from launch.progress import Progress
from launch.publish import publish_weights
from launch.recorder import Recorder
from launch.reference_pass import require_scored, score_by_learner, score_by_role
from launch.resuming import BASELINE, REFERENCE, require_same_data, require_same_model, require_same_models
from launch.roles import OnlineRoles, online_roles, reference_roles, supervised_roles
from launch.rundir import RunDir
from launch.stopping import StopRequest
from launch.supervised import SupervisedDriver
from launch.supervised_state import SupervisedProgress, SupervisedState


@dataclass(frozen=True)
class RunResult:
    """How a run ended: where its files are, how far it came, and whether it was stopped before its end."""

    folder: Path
    steps: int
    stopped: bool


def run(config: RunConfig, *, resume: bool, stop: StopRequest) -> RunResult:
    """Carry out a run.

    Args:
        config: what to do.
        resume: go on from the newest checkpoint of a run of this name.
        stop: asks, once requested, for a checkpoint and an end between two iterations.

    Raises:
        LaunchError: the run's folder, its checkpoint, or the data, are not as they must be.
        ClusterError: a role could not be placed, failed, or was silent past its deadline.
    """
    with RunDir.of(config).held():
        run_dir = RunDir.open(config, resume=resume)
        return _run(config, run_dir, resume, stop)


def _run(config: RunConfig, run_dir: RunDir, resume: bool, stop: StopRequest) -> RunResult:
    # Listening begins after Ray has put its own handlers in place, which end the process at once.
    with connect(config.cluster, num_cpus_wanted=config.cpus_wanted()), stop.listening():
        match config:
            case LearnerRunConfig():
                return asyncio.run(_supervised(config, run_dir, resume, stop))
            case OnlineRunConfig():
                return asyncio.run(_online(config, run_dir, resume, stop))


async def _supervised(config: LearnerRunConfig, run_dir: RunDir, resume: bool, stop: StopRequest) -> RunResult:
    store = CheckpointStore(run_dir.checkpoints, keep=config.run.keep_checkpoints)
    checkpoint = store.latest() if resume else None
    saved = None if checkpoint is None else SupervisedState.read(checkpoint)
    models: dict[str, str] = {}
    reference = scored = None
    if isinstance(config, ReferredRunConfig) and config.reference is not None:
        # A block of its own: its roles have given their places back before the learner takes its own.
        async with reference_roles(config, run_dir.logs) as scoring:
            scored = await scoring.source.call_one(0, SourceActor.describe)
            require_usable(config, scored)
            models[REFERENCE] = (await scoring.reference.call(DataReferenceActor.model_digest))[0]
            if checkpoint is not None and saved is not None:
                require_same_data(saved.fingerprint, scored, checkpoint)
                require_same_model(REFERENCE, saved.models.get(REFERENCE), models[REFERENCE], config, checkpoint)
            reference = await score_by_role(scoring, models[REFERENCE], run_dir.path.parent)
    async with supervised_roles(config, run_dir.logs) as roles:
        description = await roles.source.call_one(0, SourceActor.describe)
        require_usable(config, description)
        if scored is not None:
            require_scored(scored, description)
        measured = await draw_measured(config, roles)
        num_updates = SupervisedState.planned_updates(config, description.num_rows, saved)
        refers_to_itself = reference is None and config.algorithm.needs_reference
        if standing_on := ["learner"] * config.learner.tuning.has_adapter + [REFERENCE] * refers_to_itself:
            models |= dict.fromkeys(standing_on, (await roles.learner.call(LearnerActor.model_digest))[0])
        if checkpoint is not None and saved is not None:
            require_same_data(saved.fingerprint, description, checkpoint)
            require_same_models(saved.models, models, config, checkpoint)
        if refers_to_itself:
            reference = await score_by_learner(config, roles, models[REFERENCE], run_dir.path.parent)
        if reference is not None:
            await roles.learner.call(LearnerActor.use_reference, reference)
        if checkpoint is not None:
            await roles.learner.call(LearnerActor.load, checkpoint / "learner")
            run_dir.keep_config(config)
        begun = SupervisedProgress(0, description.first_cursor, description.fingerprint)
        progress = replace(saved or begun, models=models)
        state = SupervisedState(config, store, progress, num_updates)
        with _recording(config, run_dir, num_updates, state.update) as recorder:
            stopped = await SupervisedDriver(config, roles, description, state, recorder, stop, run_dir.path).run()
        if not stopped:
            await export_learner(config, roles, measured, run_dir)
            if state.best is not None:
                await export_best(config, roles, measured, store.of(state.best), run_dir)
    return RunResult(run_dir.path, state.update, stopped)


async def _online(config: OnlineRunConfig, run_dir: RunDir, resume: bool, stop: StopRequest) -> RunResult:
    store = CheckpointStore(run_dir.checkpoints, keep=config.run.keep_checkpoints)
    checkpoint = store.latest() if resume else None
    async with online_roles(config, run_dir.logs) as roles:
        description = await roles.source.call_one(0, SourceActor.describe)
        models = await _models_outside(config, roles)
        if roles.baseline is not None and config.baseline is not None:
            # Now, while the policy still has the weights that it begins with.
            bucket_bytes = config.baseline.bucket_bytes
            await publish_weights(roles.policy, roles.baseline, version=0, bucket_bytes=bucket_bytes)
        if checkpoint is None:
            state = OnlineState.begin(config, store, description)
        else:
            state = OnlineState.read(config, store, checkpoint)
            require_same_data(state.fingerprint, description, checkpoint)
            require_same_models(state.models, models, config, checkpoint)
            if (text := state.pretraining) is not None and roles.pretraining_source is not None:
                found = await roles.pretraining_source.call_one(0, SourceActor.describe)
                require_same_data(text.fingerprint, found, checkpoint)
            loading = [roles.policy.call(PolicyActor.load, checkpoint / "policy")]
            if roles.critic is not None:
                loading.append(roles.critic.call(CriticActor.load, checkpoint / "critic"))
            await asyncio.gather(*loading)
            run_dir.keep_config(config)
        state.models = models
        with _recording(config, run_dir, state.num_iterations, state.iteration) as recorder:
            stopped = await OnlineDriver(config, roles, state, recorder, stop, run_dir).run()
        if not stopped:
            await roles.policy.call(PolicyActor.export, run_dir.model)
            if config.policy.ema_decay is not None:
                await roles.policy.call(PolicyActor.export_average, run_dir.ema)
            if config.policy.tuning.has_adapter:
                await roles.policy.call(PolicyActor.export_adapter, run_dir.adapter)
            if (best := state.evaluation.best) is not None:
                await _export_best(roles, store.of(best.iteration), run_dir.best)
    return RunResult(run_dir.path, state.iteration, stopped)


async def _models_outside(config: OnlineRunConfig, roles: OnlineRoles) -> dict[str, str]:
    """Digests of the models that checkpoints do not hold. To be called before a load.

    They are the reference, the bases of adapters, and the policy as it begins where a baseline answers with that.
    """
    has_adapter, has_baseline = config.policy.tuning.has_adapter, roles.baseline is not None
    asked: dict[str, Awaitable[list[str]]] = {}
    if roles.reference is not None:
        asked[REFERENCE] = roles.reference.call(ReferenceActor.model_digest)
    if has_adapter or has_baseline:
        asked["policy"] = roles.policy.call(PolicyActor.model_digest)
    if roles.critic is not None and config.critic is not None and config.critic.tuning.has_adapter:
        asked["critic"] = roles.critic.call(CriticActor.model_digest)
    digests = await asyncio.gather(*asked.values())
    models = {role: of_ranks[0] for role, of_ranks in zip(asked, digests, strict=True)}
    if has_baseline:
        models[BASELINE] = models["policy"] if has_adapter else models.pop("policy")
    return models


async def _export_best(roles: OnlineRoles, checkpoint: Path, place: Path) -> None:
    """Export the model of the best checkpoint; the policy has its weights from then on.

    Raises:
        CheckpointError: somebody has removed the checkpoint.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}, the best checkpoint, is gone, so that its model cannot be exported")
    await roles.policy.call(PolicyActor.load, checkpoint / "policy")
    await roles.policy.call(PolicyActor.export, place)


@contextmanager
def _recording(config: RunConfig | LearnerRunConfig, run_dir: RunDir, num_steps: int, done: int) -> Iterator[Recorder]:
    stage = config.algorithm.name
    with (
        MetricsWriter(run_dir.path, resume_after=done) as writer,
        Progress(stage, num_steps, first_step=done, log_every=config.run.log_every) as progress,
    ):
        yield Recorder(writer, progress)
