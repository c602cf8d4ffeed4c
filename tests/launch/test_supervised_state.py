"""When a supervised run evaluates, saves and stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.order import Cursor
from launch.checkpoint import CheckpointStore
from launch.config import SupervisedRunConfig
from launch.configfile import load
from launch.supervised_state import SupervisedProgress, SupervisedState

SFT = Path(__file__).parents[2] / "examples" / "sft.yaml"


def state(folder: Path, *overrides: str, num_updates: int = 20) -> SupervisedState:
    config = load(SFT, ["algorithm.evaluate_every=3", *overrides])
    assert isinstance(config, SupervisedRunConfig)
    return SupervisedState(config, CheckpointStore(folder, keep=1), SupervisedProgress(0, "{}", "f"), num_updates)


def test_early_stopping_waits_for_its_patience(tmp_path: Path) -> None:
    training = state(tmp_path, "algorithm.early_stopping_patience=2")
    for loss, finished in ((2.0, False), (1.0, False), (1.5, False), (0.9, False), (0.9, False), (1.1, True)):
        training.evaluated(loss)
        assert training.finished is finished


def test_the_best_is_kept_where_training_may_stop_early(tmp_path: Path) -> None:
    """Its checkpoint is due at once. The start is no best: it has none."""
    training = state(tmp_path, "algorithm.early_stopping_patience=9")
    found = []
    for loss in (2.0, 1.5, 1.6, 1.2, 1.3):
        training.evaluated(loss)
        found.append((training.best, training.checkpoint_due()))
        for _ in range(3):
            training.advance("{}")
    assert found == [(None, False), (3, True), (3, False), (9, True), (9, False)]
    without = state(tmp_path)
    without.advance("{}")
    without.evaluated(1.0)
    assert without.best is None and not without.checkpoint_due()


def test_without_patience_only_the_end_ends(tmp_path: Path) -> None:
    training = state(tmp_path, num_updates=2)
    for _ in range(5):
        training.evaluated(3.0)
    assert not training.finished
    training.advance("{}")
    training.advance("{}")
    assert training.finished


def test_pauses_are_where_something_is_due(tmp_path: Path) -> None:
    training = state(tmp_path, "run.checkpoint_every=4", num_updates=10)
    pauses, due = [], []
    while not training.finished:
        pause = training.next_pause()
        while training.update < pause:
            training.advance("{}")
        pauses.append(pause)
        due.append((training.evaluation_due(), training.checkpoint_due()))
    assert pauses == [3, 4, 6, 8, 9, 10]
    assert due == [(True, False), (False, True), (True, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize(("num_rows", "updates"), [(32, 3), (33, 4), (1, 1)])
def test_updates_of_the_epochs(num_rows: int, updates: int) -> None:
    config = load(SFT)
    assert isinstance(config, SupervisedRunConfig)
    assert config.algorithm.num_epochs == 3 and config.algorithm.batch_size == 32
    assert SupervisedState.planned_updates(config, num_rows) == updates


@pytest.mark.parametrize(("num_epochs", "num_rows", "planned"), [(1.1, 10, 11), (0.5, 7, 4), (3, 33, 99), (0.01, 3, 1)])
def test_a_fraction_of_an_epoch_is_a_whole_number_of_rows(num_epochs: float, num_rows: int, planned: int) -> None:
    config = load(SFT, [f"algorithm.num_epochs={num_epochs}", "algorithm.batch_size=1"])
    assert isinstance(config, SupervisedRunConfig)
    assert SupervisedState.planned_updates(config, num_rows) == planned
    assert SupervisedState.rows_left(config, num_rows, "{}") == planned


def test_a_resume_plans_what_is_left() -> None:
    """With what the configuration says by now: the last batch of an epoch that had ended was a thin one."""
    def planned(progress: SupervisedProgress, *overrides: str) -> int:
        config = load(SFT, ["algorithm.num_epochs=1", *overrides])
        assert isinstance(config, SupervisedRunConfig)
        return SupervisedState.planned_updates(config, 42, progress)

    one, two = (SupervisedProgress(update, Cursor(0, 0, drawn).to_json(), "f") for update, drawn in ((1, 32), (2, 42)))
    assert planned(SupervisedProgress(0, "{}", "f")) == planned(one) == planned(two) == 2
    assert planned(two, "algorithm.num_epochs=2") == 4
    assert planned(one, "algorithm.batch_size=3") == 1 + 4
    assert planned(two, "algorithm.num_epochs=2", "run.num_iterations=3") == 3
