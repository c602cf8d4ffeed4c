"""What the command line says, and what it ends with."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from cluster.errors import ClusterError, PlacementFailed, RoleFailed
from data.errors import RowError
from launch.cli import app
from launch.config import RunConfig
from launch.errors import CheckpointError, RunDirError
from launch.stopping import StopRequest

SFT = str(Path(__file__).parents[2] / "examples" / "sft.yaml")
Outcome = tuple[int, str, str]


class Ended:
    """What ``launch.run.run`` returns."""

    folder = Path("/runs/demo")
    steps = 7

    def __init__(self, stopped: bool = False) -> None:
        self.stopped = stopped


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``troupe train`` with another ``run`` in the place of the heavy one."""

    def with_run(run: Callable[..., object], *words: str) -> Outcome:
        module = ModuleType("launch.run")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "launch.run", module)
        done = CliRunner().invoke(app, ["train", SFT, *words])
        return done.exit_code, done.stdout, done.stderr

    return with_run


def test_what_was_asked_for_reaches_the_run(train: Callable[..., Outcome]) -> None:
    seen: list[tuple[int, bool]] = []

    def run(config: RunConfig, *, resume: bool, stop: StopRequest) -> Ended:
        seen.append((config.run.seed, resume))
        return Ended()

    assert train(run, "run.seed=3", "--resume") == (0, "done: 7 steps; model in /runs/demo/model\n", "")
    assert seen == [(3, True)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunDirError("holds a run already"), 2),
        (RowError("a.jsonl:3: no key [prompt]"), 2),
        (PlacementFailed("no place for policy"), 2),
        (RoleFailed("policy", 1, "10.0.0.1", "ValueError: [/] is no tensor", ""), 1),
        (ClusterError("the cluster is gone"), 1),
        (CheckpointError("No space left on device"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_told_plainly(train: Callable[..., Outcome], error: Exception, code: int) -> None:
    def run(config: RunConfig, *, resume: bool, stop: StopRequest) -> Ended:
        raise error

    # As it is written: brackets are no markup, and lines are not broken.
    assert train(run) == (code, "", f"error: {error}\n")
    with pytest.raises(type(error)):
        CliRunner().invoke(app, ["train", SFT, "--traceback"], catch_exceptions=False)


def test_an_error_of_ours_keeps_its_traceback(train: Callable[..., Outcome]) -> None:
    def run(config: RunConfig, *, resume: bool, stop: StopRequest) -> Ended:
        raise ZeroDivisionError

    train(run)
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(app, ["train", SFT], catch_exceptions=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(
    train: Callable[..., Outcome], number: signal.Signals, code: int
) -> None:
    def run(config: RunConfig, *, resume: bool, stop: StopRequest) -> Ended:
        stop.signal = number
        return Ended(stopped=True)

    ended, output, _ = train(run)
    assert ended == code
    assert f"stopped by {number.name} after step 7; a checkpoint is in /runs/demo; go on with --resume" in output


def test_a_mistake_in_the_configuration_comes_before_anything_heavy(train: Callable[..., Outcome]) -> None:
    def run(config: RunConfig, *, resume: bool, stop: StopRequest) -> Ended:
        raise AssertionError("must not be reached")

    code, _, told = train(run, "run.sede=1")
    assert code == 2
    assert told == f"error: {SFT}: 1 problem\n  run.sede (override run.sede=1): unknown key; did you mean 'seed'?\n"
