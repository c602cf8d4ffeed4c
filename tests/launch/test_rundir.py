"""A run's folder is begun once."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.configfile import load
from launch.errors import RunDirError
from launch.rundir import RunDir

SFT = Path(__file__).parents[2] / "examples" / "sft.yaml"


def test_begun_once_then_only_resumed(tmp_path: Path) -> None:
    config = load(SFT, [f"run.root={tmp_path}", "run.name=first"])
    run_dir = RunDir.open(config, resume=False)
    assert run_dir.path == tmp_path / "first"
    assert load(run_dir.config) == config
    with pytest.raises(RunDirError, match=r"first holds a run already; add --resume .*run\.name="):
        RunDir.open(config, resume=False)
    assert RunDir.open(config, resume=True) == run_dir


def test_nothing_to_resume(tmp_path: Path) -> None:
    config = load(SFT, [f"run.root={tmp_path}"])
    with pytest.raises(RunDirError, match="holds no run to resume; start it without --resume"):
        RunDir.open(config, resume=True)


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirError, match=r"cannot write to .*file.*choose another run\.root"):
        RunDir.open(load(SFT, [f"run.root={tmp_path / 'file'}"]), resume=False)
