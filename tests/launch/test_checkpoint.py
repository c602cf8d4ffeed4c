"""Checkpoints are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest

from cluster.errors import RoleFailed
from launch.checkpoint import CheckpointStore
from launch.errors import CheckpointError


def write(store: CheckpointStore, step: int, text: str = "weights") -> None:
    with store.writing(step) as folder:
        (folder / "policy").mkdir()
        (folder / "policy" / "model.pt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_newest_and_finds_the_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 10, 15):
        write(store, step, f"weights {step}")
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    assert (store.latest() / "policy" / "model.pt").read_text() == "weights 15"


def test_the_best_stays_for_as_long_as_it_is_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    kept = []
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
        with store.writing(step, best=best) as folder:
            (folder / "weights").write_text("")
        kept.append([int(name.removeprefix("step-")) for name in names(tmp_path)])
    assert kept == [[1], [1, 2], [1, 3], [4], [4, 5]]
    assert store.of(4) == tmp_path / "step-00000004"


def test_failure_leaves_the_old_one_and_nothing_half(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    with pytest.raises(RuntimeError, match="rank 1 died"), store.writing(2) as folder:
        (folder / "part").write_text("half")
        raise RuntimeError("rank 1 died")
    assert names(tmp_path) == ["step-00000001"]


def test_full_disk_says_so_and_leaves_the_old_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written to .*No space left on device"):  # noqa: SIM117
        with store.writing(2):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert store.latest().name == "step-00000001"


def test_a_rank_that_cannot_write_is_named_and_the_old_one_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    cases = (
        (1, OSError(errno.ENOSPC, "No space left on device"), "there is none before it"),
        (2, RuntimeError("unexpected pos 576 vs 534"), "step-00000001 is as it was, and --resume"),
    )
    for step, raised, kept in cases:
        cause = rf"policy rank 1 \(node a\): {type(raised).__name__}: {re.escape(str(raised))}"
        wanted = rf"step {step} could not be written to {tmp_path}: {cause}; its disk has \d+ MiB free; {kept}"
        with pytest.raises(CheckpointError, match=wanted) as caught:  # noqa: SIM117
            with store.writing(step) as folder:
                (folder / "policy").mkdir()
                raise RoleFailed("policy", 1, "a", "PolicyActor.save raised", "", raised)
        assert isinstance(caught.value.__cause__, RoleFailed)
        assert names(tmp_path) == ([] if step == 1 else ["step-00000001"])
        write(store, 1)
    with pytest.raises(RoleFailed, match="died"), store.writing(2):
        raise RoleFailed("policy", 1, "a", "its process (pid 7) died", "")


@pytest.mark.parametrize("harm", ["cut", "change", "remove", "no manifest", "cut manifest"])
def test_incomplete_ones_are_passed_over_and_named(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    write(store, 1)
    write(store, 2)
    model = tmp_path / "step-00000002" / "policy" / "model.pt"
    if harm == "cut":
        model.write_text("wei")
    elif harm == "change":
        model.write_text("weighty")  # as long as before
    elif harm == "remove":
        model.unlink()
    elif harm == "cut manifest":
        (tmp_path / "step-00000002" / "manifest.json").write_text('{"step": 2, "files": {"policy/mo')
    else:
        (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert store.latest().name == "step-00000001"
    assert "step-00000002 is not a whole checkpoint" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this root cannot mount")
    try:
        store = CheckpointStore(tmp_path / "checkpoints", keep=1)
        write(store, 1)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left on device"):
            write(store, 2, "x" * (2 << 20))
        assert names(tmp_path / "checkpoints") == ["step-00000001"]
        assert (store.latest() / "policy" / "model.pt").read_text() == "weights"
        write(store, 2)
        assert store.latest().name == "step-00000002"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for left in (".step-00000001.part", ".step-00000000.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "part").write_text("half")
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 2)
    assert names(tmp_path) == ["step-00000002"]


def test_a_broken_newer_one_does_not_push_out_the_last_whole_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    (tmp_path / "step-00000009").mkdir()
    write(store, 2)
    assert store.latest().name == "step-00000002"


def test_none_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        CheckpointStore(tmp_path, keep=1).latest()


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 3, "old")
    write(store, 3, "new")
    assert (store.latest() / "policy" / "model.pt").read_text() == "new"
