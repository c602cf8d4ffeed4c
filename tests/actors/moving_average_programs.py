"""What the tests of moving averages run in each rank's process. Every function takes the rank's context first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from actors.deepspeed_engine import TrainEngine
from actors.errors import RoleError
from actors.models import load_causal_lm, load_tokenizer
from cluster.context import RankContext
from tests.actors import engine_programs as programs

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
    return said
