"""What a run compares before it trains, over stand-ins for the roles."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.source import SourceDescription
from data.build import Counts
from launch import run
from launch.config import OnlineRunConfig, PreferenceRunConfig
from launch.configfile import load
from launch.errors import CheckpointError, DataChanged
from launch.resuming import require_same_models
from launch.roles import OnlineRoles
from launch.rundir import RunDir
from launch.stopping import StopRequest
from tests.launch.test_online_driver import Group
from tests.launch.test_resume import described

METHODS = Path(__file__).parents[2] / "examples" / "methods"


class Source:
    def __init__(self, description: SourceDescription) -> None:
        self.describe = lambda: description


class Model:
    """Has a digest, and keeps what it is told to use."""

    def __init__(self, digest: str = "m") -> None:
        self.model_digest = lambda: digest
        self.used: list[Path] = []

    def use_reference(self, file: Path) -> None:
        self.used.append(file)


class Driver:
    """Trains nothing, and is stopped."""

    def __init__(self, *args: Any) -> None:
        pass

    async def run(self) -> bool:
        return True


def there(roles: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def given(config: Any, log_dir: Path) -> AsyncIterator[Any]:
        yield roles

    return given


async def test_what_the_reference_scored_is_what_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source reads the files once for the reference, and again for the learner: they may change in between."""
    config = load(METHODS / "dpo_reference.yaml", [f"run.root={tmp_path}"])
    assert isinstance(config, PreferenceRunConfig)
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    before = replace(described("f"), kind="comparisons", most_responses=2)
    kept = tmp_path / "kept.arrow"

    async def score(*args: Any) -> Path:
        return kept

    async def train(found: SourceDescription) -> list[Path]:
        learner = Model()
        scoring = SimpleNamespace(source=Group(Source(before)), reference=Group(Model()))
        training = SimpleNamespace(source=Group(Source(found)), learner=Group(learner))
        monkeypatch.setattr(run, "reference_roles", there(scoring))
        monkeypatch.setattr(run, "supervised_roles", there(training))
        await run._supervised(config, run_dir, False, StopRequest())
        return learner.used

    monkeypatch.setattr(run, "score_by_role", score)
    monkeypatch.setattr(run, "SupervisedDriver", Driver)
    assert await train(before) == [kept]
    now = replace(before, digest="e", counts=(Counts("a.jsonl", read=4, train=4),))
    with pytest.raises(DataChanged, match=r"the reference scored a\.jsonl: 3 rows .* training reads a\.jsonl: 4 rows"):
        await train(now)


def initial_baseline(*overrides: str) -> OnlineRunConfig:
    config = load(METHODS / "initial_baseline.yaml", ["policy.model.path=/models/one", *overrides])
    assert isinstance(config, OnlineRunConfig)
    return config


async def asked(config: OnlineRunConfig, policy: str, *, baseline: bool = True) -> dict[str, str]:
    roles = SimpleNamespace(
        policy=Group(Model(policy)), reference=None, critic=None, baseline=Group(None) if baseline else None
    )
    return await run._models_outside(config, cast(OnlineRoles, roles))


async def test_a_resume_compares_with_the_initial_model_that_it_began_with() -> None:
    """The engines of a baseline get the policy's weights before a checkpoint's are loaded: whatever lies there now."""
    config = initial_baseline()
    assert await asked(config, "a" * 32, baseline=False) == {}
    saved, found = await asked(config, "a" * 32), await asked(config, "c" * 32)
    require_same_models(saved, dict(saved), config, Path("step-2"))
    message = (
        r"the initial model, which baseline answers with, .*step-2 .*policy\.model\.path \(/models/one\).*"
        "aaaaaaaaaaaa then, cccc"
    )
    with pytest.raises(CheckpointError, match=message):
        require_same_models(saved, found, config, Path("step-2"))
    # Whether there is a baseline is the configuration's to say; a checkpoint of before may name none.
    require_same_models({}, found, config, Path("step-2"))
    require_same_models(saved, {}, config, Path("step-2"))


async def test_a_baseline_beside_an_adapter_is_named_too() -> None:
    config = initial_baseline("policy.tuning.method=lora")
    assert await asked(config, "a" * 32) == {"policy": "a" * 32, "baseline": "a" * 32}
