"""Checkpoints on disk: each a folder that is there as a whole or not at all.

Invariants:

- A checkpoint is written beside its place, closed by a manifest of its files and their sizes, flushed, and renamed.
  A folder without a manifest that agrees with it is not a checkpoint.
- Old checkpoints go only after a newer one is in place, so at every moment one can be resumed from.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "step-"


class CheckpointStore:
    """The checkpoints of a run, newest ``keep`` of them."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of ``step`` into; in its place when the ``with`` block ends well.

        Raises:
            CheckpointError: it could not be written; the checkpoints there were are untouched.
        """
        place = self._folder / f"{_PREFIX}{step:08d}"
        beside = self._folder / f".{place.name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir(parents=True)
            yield beside
            _seal(beside, step)
            if place.exists():
                shutil.rmtree(place)
            os.replace(beside, place)
            _flush(self._folder)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._folder}: {error}; the ones before it "
                "are as they were"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)

    def latest(self) -> Path:
        """The newest whole checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        complete = self._complete()
        if not complete:
            raise CheckpointError(f"{self._folder} holds no whole checkpoint to resume from; start the run anew")
        return complete[-1]

    def _complete(self) -> list[Path]:
        """Whole checkpoints, oldest first; others are named in the log."""
        found = []
        for folder in sorted(self._folder.glob(f"{_PREFIX}*")):
            if problem := _problem(folder):
                logger.warning("%s is not a whole checkpoint and is passed over: %s", folder, problem)
            else:
                found.append(folder)
        return found


def _seal(folder: Path, step: int) -> None:
    """Write the manifest last, and everything to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": sizes}, indent=1))
    for path in (*files, folder / MANIFEST):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _problem(folder: Path) -> str:
    """What keeps a folder from being a whole checkpoint; empty if nothing does."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its manifest cannot be read ({error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or of another size"
    return ""
