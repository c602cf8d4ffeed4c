"""A run's folder is begun once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.configfile import load
from launch.errors import RunDirError
from launch.rundir import METRICS_FILE, RunDir

ROOT = Path(__file__).parents[2]
SFT = ROOT / "examples" / "sft.yaml"


def test_begun_once_then_only_resumed(tmp_path: Path) -> None:
    config = load(SFT, [f"run.root={tmp_path}", "run.name=first"])
    run_dir = RunDir.open(config, resume=False)
    assert run_dir.path == tmp_path / "first"
    assert load(run_dir.config) == config
    # What never came to a step leaves its name free.
    assert RunDir.open(config, resume=False) == run_dir
    (run_dir.path / METRICS_FILE).write_text('{"step": 1}\n')
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


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    program = (
        "import sys; from pathlib import Path; from launch.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).held():\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(run_dir.path)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        said = rf"is in use by process {other.pid} on .*; wait for it to end"
        with pytest.raises(RunDirError, match=said), run_dir.held():
            pass
        other.kill()
        other.wait()
        with run_dir.held():  # the lock has gone with the process
            pass


def test_a_resume_tells_what_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old and new, and config.yaml stays what it was until the checkpoint has been taken."""
    begun = load(SFT, [f"run.root={tmp_path}"])
    run_dir = RunDir.open(begun, resume=False)
    (run_dir.path / METRICS_FILE).write_text('{"step": 1}\n')
    RunDir.open(begun, resume=True)
    assert caplog.messages == []
    changed = ["learner.optimizer.learning_rate=0.5", "learner.tuning.method=lora", "learner.tuning.lora.alpha=3.0"]
    resumed = load(SFT, [f"run.root={tmp_path}", *changed])
    RunDir.open(resumed, resume=True)
    told = sorted(message.removeprefix("resume with another ") for message in caplog.messages)
    assert [line.partition(":")[0] for line in told] == [
        "learner.optimizer.learning_rate",
        "learner.tuning.lora.alpha",
        "learner.tuning.method",
    ]
    assert told[2] == 'learner.tuning.method: "full" -> "lora"' and told[0].endswith("-> 0.5")
    assert load(run_dir.config) == begun
    run_dir.keep_config(resumed)
    assert load(run_dir.config) == resumed
