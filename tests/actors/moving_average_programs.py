"""What the tests of moving averages run in each rank's process. Every function takes the rank's context first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import PolicyConfig
from actors.deepspeed_engine import TrainEngine
from actors.errors import RoleError
from actors.models import load_causal_lm, load_tokenizer
from actors.moving_average import MovingAverage
from actors.policy import PolicyActor
from actors.process_group import join_ranks
from algorithms.config import OnlineConfig
from cluster.context import RankContext
from tests.actors import engine_programs as programs
from tests.actors import role_programs

DECAY = 0.75
Weights = dict[str, Tensor]


def engine(own: RankContext, folder: Path, stage: int, decay: float | None = DECAY, **changes: Any) -> TrainEngine:
    settings = programs.config(folder, stage, **changes)
    return TrainEngine(load_causal_lm(settings.model), own, settings, decay)


def train(own: RankContext, role: TrainEngine, steps: range) -> list[Weights]:
    """The weights after each step."""
    weights = []
    for step in steps:
        rows = programs.batch(step)
        loss = programs.token_loss(sum(len(row) - 1 for row in rows))
        role.step(programs.deal(rows, own, 3), loss, 1e-2)
        weights.append(programs.weights(role))
    return weights


def averages(role: TrainEngine) -> Weights:
    assert role._average is not None
    return dict(role._average.whole())


def follow(
    own: RankContext, folder: Path, stage: int, changes: dict[str, Any], export: Path
) -> tuple[list[Weights], Weights, Weights]:
    """Weights before and after each of four steps, the average of them, and that of a run resumed after two."""
    whole = engine(own, folder, stage, **changes)
    weights = [programs.weights(whole), *train(own, whole, range(4))]
    first = engine(own, folder, stage, **changes)
    train(own, first, range(2))
    first.save(export / "checkpoint")
    second = engine(own, folder, stage, **changes)
    second.load(export / "checkpoint")
    train(own, second, range(2, 4))
    whole.export_average(export / "ema", load_tokenizer(programs.config(folder, stage).model))
    return weights, averages(whole), averages(second)


def refused(own: RankContext, folder: Path, target: Path) -> list[str]:
    """What is said where no average is kept."""
    without = engine(own, folder, 1, None)
    without.save(target)
    said = []
    try:
        without.export_average(target, None)
    except RoleError as error:
        said.append(str(error))
    try:
        engine(own, folder, 1).load(target)
    except RoleError as error:
        said.append(str(error))
    try:
        with without.averaged():
            said.append("entered")
    except RoleError as error:
        said.append(str(error))
    return said


class Broken(Exception):
    """What a test raises."""


def in_place(own: RankContext, folder: Path) -> tuple[bool, bool, bool]:
    """Without DeepSpeed: are the averages in place inside, and the weights back afterwards, and after an error?"""
    device = join_ranks(own)
    model = load_causal_lm(programs.config(folder, 1, dtype="bfloat16").model)
    average = MovingAverage(model, own, DECAY, device, sharded=False)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    average.update()
    own_weights = [parameter.detach().clone() for parameter in model.parameters()]
    expected = [weight for _, weight in average.whole()]

    def are(weights: list[Tensor]) -> bool:
        return all(torch.equal(p, weight) for p, weight in zip(model.parameters(), weights, strict=True))

    assert not are(expected)
    with average.in_place():
        inside = are(expected)
    outside = are(own_weights)
    try:
        with average.in_place():
            raise Broken
    except Broken:
        return inside, outside, are(own_weights)


def policy(own: RankContext, folder: Path, stage: int, dtype: str, decay: float = DECAY) -> PolicyActor:
    """A policy that is held close to its own average."""
    arguments = role_programs.trained(folder, stage, dtype=dtype)
    config = PolicyConfig(**arguments, ema_decay=decay, ema_is_reference=True)
    return PolicyActor(own, config, OnlineConfig(), role_programs.sampling(), 3, role_programs.NUM_ITERATIONS)


def refer(
    own: RankContext, folder: Path, stage: int, dtype: str, rollouts: list[pa.RecordBatch], target: Path
) -> list[list[float]]:
    """This rank's rows under the average of a policy that has learnt; all else is asserted."""
    actor, undisturbed = policy(own, folder, stage, dtype), policy(own, folder, stage, dtype)

    def reference(of: PolicyActor) -> list[list[float]]:
        batch = of.score_reference(rollouts)[0]
        assert batch.schema.names[1] == "ref_logprobs"
        rows: list[list[float]] = batch.column(1).to_pylist()
        return rows

    def scores(of: PolicyActor) -> list[list[float]]:
        rows: list[list[float]] = of.score(rollouts)[0].column(1).to_pylist()
        return rows

    def equal(one: Weights, other: Weights) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert reference(actor) == scores(actor), "before the first update the average is the initial model"
    train(own, actor._engine, range(2))
    train(own, undisturbed._engine, range(2))
    weights, before = programs.weights(actor._engine), scores(actor)
    expected = reference(actor)
    assert expected != before, "the policy has gone on"
    assert equal(programs.weights(actor._engine), weights) and scores(actor) == before, "the weights are not back"
    _break_off(actor, rollouts)
    assert equal(programs.weights(actor._engine), weights) and scores(actor) == before, "an error left the average"
    assert reference(actor) == expected, "the average has moved without an update"
    actor.export_average(target / "ema")
    assert scores(policy(own, target / "ema", stage, dtype)) == expected, "it is another model than is exported"
    actor.save(target / "checkpoint")
    resumed = policy(own, folder, stage, dtype)
    resumed.load(target / "checkpoint")
    assert reference(resumed) == expected, "a checkpoint does not hold the reference"
    after = train(own, actor._engine, range(2, 4))[-1]
    assert equal(after, train(own, undisturbed._engine, range(2, 4))[-1]), "training noticed"
    assert reference(actor) != expected, "the reference stays"
    return expected


def _break_off(actor: PolicyActor, rollouts: list[pa.RecordBatch]) -> None:
    """Score the reference, and raise in the middle of the model, when other layers' weights are gathered."""

    def fail(*_: object) -> None:
        raise Broken

    layers = next(module for module in actor._engine._model.modules() if isinstance(module, nn.ModuleList))
    hook = layers[-1].register_forward_hook(fail)
    try:
        actor.score_reference(rollouts)
    except Broken:
        return
    finally:
        hook.remove()
    raise AssertionError("it was not broken off")
