"""What ``troupe check`` says of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.check_tuning import check_tuning
from launch.configfile import load

ROOT = Path(__file__).parents[2]


def looked_at(name: str, *overrides: str) -> tuple[list[str], list[tuple[str, str]]]:
    """What is wrong, and what was found."""
    facts: list[tuple[str, str]] = []
    return [str(problem) for problem in check_tuning(load(ROOT / name, overrides), facts)], facts


@pytest.fixture(autouse=True)
def runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(home))


def test_full_tuning_asks_nothing() -> None:
    assert looked_at("ray_config.yaml") == ([], [])


def test_layers_that_get_an_adapter_are_counted() -> None:
    problems, [(where, found)] = looked_at("examples/dpo.yaml", "learner.tuning.method=lora")
    assert problems == []
    assert where == "learner.tuning"
    assert found.startswith("lora on ")


def test_layers_that_are_not_there_are_refused() -> None:
    targets = "critic.tuning.lora.targets=[k_proj,no_such_layer]"
    [problem], _ = looked_at("ray_config.yaml", "critic.tuning.method=lora", targets)
    assert problem.startswith("critic.tuning: ")
    assert "no_such_layer" in problem
