"""Checkpoints on disk: each a folder that is there as a whole or not at all.

Invariants:

- A checkpoint is written beside its place, closed by a manifest of its files, their sizes and digests, flushed, and
  renamed. A folder without a manifest that agrees with it is not a checkpoint.
- The checkpoint that is named the best stays for as long as it is that, however old it is.
- Old checkpoints go only after a newer one is in place, so at every moment one can be resumed from.
- What is being written or removed has a name that starts with a dot, and is cleared away by the next checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from cluster.errors import RoleFailed
from launch.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "step-"
_CHUNK_BYTES = 16 << 20


class CheckpointStore:
    """The checkpoints of a run, newest ``keep`` of them, and the best where one is named."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    @contextmanager
    def writing(self, step: int, *, best: int | None = None) -> Iterator[Path]:
        """A folder to write the checkpoint of ``step`` into; in its place when the ``with`` block ends well.

        Args:
            best: the step of the best checkpoint, this one or one before it, which is kept besides the newest.

        Raises:
            CheckpointError: this process, or a rank in the ``with`` block, could not write it; the checkpoints there
                were are untouched.
            RoleFailed: the process of a rank died meanwhile.
        """
        place = self.of(step)
        beside = self._folder / f".{place.name}.part"
        for left in self._folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            yield beside
            _seal(beside, step)
            replaced = _set_aside(place) if place.exists() else None
            os.replace(beside, place)
            _flush(self._folder)
            if replaced is not None:
                shutil.rmtree(replaced)
        except OSError as error:
            raise self._unwritten(step, str(error)) from error
        except RoleFailed as error:
            # Of any type: where a disk is full, PyTorch's writer raises a RuntimeError that does not say so.
            if error.raised is None:
                raise
            why = f"{error.role} rank {error.rank} (node {error.node}): {type(error.raised).__name__}: {error.raised}"
            raise self._unwritten(step, why) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        for old in self._complete()[: -self._keep]:
            if best is None or old != self.of(best):
                shutil.rmtree(_set_aside(old))

    def of(self, step: int) -> Path:
        """Where the checkpoint of a step is, if it is kept."""
        return self._folder / f"{_PREFIX}{step:08d}"

    def latest(self) -> Path:
        """The newest whole checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        for folder in reversed(self._complete()):
            if damaged := _damaged(folder):
                logger.warning("%s is not a whole checkpoint and is passed over: %s", folder, damaged)
            else:
                return folder
        raise CheckpointError(f"{self._folder} holds no whole checkpoint to resume from; start the run anew")

    def _unwritten(self, step: int, why: str) -> CheckpointError:
        whole = self._complete()
        kept = f"{whole[-1].name} is as it was, and --resume goes on from it" if whole else "there is none before it"
        what = f"the checkpoint of step {step} could not be written to {self._folder}"
        return CheckpointError(f"{what}: {why}; {_free(self._folder)}; {kept}")

    def _complete(self) -> list[Path]:
        """Checkpoints with all their files, oldest first; others are named in the log."""
        found = []
        for folder in sorted(self._folder.glob(f"{_PREFIX}*")):
            if problem := _incomplete(folder):
                logger.warning("%s is not a whole checkpoint and is passed over: %s", folder, problem)
            else:
                found.append(folder)
        return found


def _free(folder: Path) -> str:
    """What the disk of a folder has left, half a checkpoint on it included."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return f"its disk has {shutil.disk_usage(there).free >> 20} MiB free"


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint that is to be removed: half removed, it must not look like one."""
    return folder.rename(folder.with_name(f".{folder.name}.old"))


def _seal(folder: Path, step: int) -> None:
    """Write the manifest last, and everything to disk."""
    inside = sorted(folder.rglob("*"))
    files = [path for path in inside if path.is_file()]
    facts = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": digest}
        for path, digest in zip(files, _digests(files), strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": facts}, indent=1))
    for path in (*inside, folder / MANIFEST, folder):
        _flush(path)


def _digests(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(_digest, files))


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    digest: str = state.hexdigest()
    return digest


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return {name: (int(facts["bytes"]), str(facts["xxh3_128"])) for name, facts in files.items()}


def _incomplete(folder: Path) -> str:
    """What a checkpoint lacks; empty if nothing. Reads no content, so it is quick at any size."""
    try:
        files = _manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or of another size"
    return ""


def _damaged(folder: Path) -> str:
    """Which file of a complete checkpoint has another content than was written; empty if none."""
    files = _manifest(folder)
    found = _digests([folder / name for name in files])
    changed = [name for (name, (_, digest)), now in zip(files.items(), found, strict=True) if digest != now]
    return f"{', '.join(changed)} has another content than was written" if changed else ""
