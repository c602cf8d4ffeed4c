"""A run's folder: everything a run writes lies in ``<run.root>/<run.name>/``.

    config.yaml     the resolved configuration; after a resume the one that it went on with
    metrics.jsonl   one object a step; tensorboard/ holds the same as events
    logs/           one file for each rank of each role
    checkpoints/    step-00000010/, written whole or not at all; best.json names the best, where one is looked for
    experience/     iteration_000003.arrow, where run.keep_experience is on
    evaluation/     iteration_000003.arrow: responses to held-out prompts, with their scores
    model/          the trained model in Hugging Face form, at the end; adapters are merged into it
    reliability.svg a reward model's accuracy by its confidence, on held-out comparisons
    normalisation.json  what a reward model's scores were multiplied by and what was added, and why
    best/           the model of the best checkpoint, at the end (best_normalisation.json: of that one)
    ema/            the moving average of the policy, where policy.ema_decay is set
    adapter/        the adapter alone, as PEFT loads it, where the model was tuned by one

Invariant: a folder is begun once. To begin again under the same name the user moves or removes it; nothing here does.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.config import BaseRunConfig, RunConfig
from launch.configfile import changes, dump
from launch.errors import RunDirError
from launch.paths import runs_root

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class RunDir:
    """The paths of a run."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> RunDir:
        """Where a run's folder is, or will be.

        Raises:
            RunDirError: it would be deleted with the submitted job.
        """
        return cls(runs_root(config.run.root) / config.run.name)

    @classmethod
    def open(cls, config: RunConfig, *, resume: bool) -> RunDir:
        """Begin the folder of a run, or open the one to go on with.

        The configuration of a run that is begun is written down. Of one that goes on what has changed is told, and it
        is written by ``keep_config`` once the checkpoint has been taken.

        Raises:
            RunDirError: there is one already and ``resume`` is not asked for; there is none to resume; or it cannot
                be written.
        """
        run_dir = cls.of(config)
        begun = run_dir.begun
        if begun and not resume:
            raise RunDirError(
                f"{run_dir.path} holds a run already; add --resume to go on with it, give this one another name "
                f"(run.name=...), or remove the folder"
            )
        if resume and not begun:
            raise RunDirError(f"{run_dir.path} holds no run to resume; start it without --resume")
        try:
            for folder in (run_dir.logs, run_dir.checkpoints, run_dir.experience):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise run_dir._unwritable(error) from error
        if resume:
            run_dir._tell_changes(config)
        else:
            run_dir.keep_config(config)
        return run_dir

    def keep_config(self, config: BaseRunConfig) -> None:
        """Write down the configuration that the run has from now on.

        Raises:
            RunDirError: it cannot be written.
        """
        try:
            self.config.write_text(dump(config))
        except OSError as error:
            raise self._unwritable(error) from error

    def _tell_changes(self, config: RunConfig) -> None:
        if not self.config.is_file():
            logger.warning("%s is gone, so that what has changed since cannot be told", self.config)
            return
        for change in changes(self.config, config):
            logger.warning("resume with another %s", change)

    def _unwritable(self, error: OSError) -> RunDirError:
        return RunDirError(f"cannot write to {self.path}: {error.strerror}; choose another run.root")

    @property
    def begun(self) -> bool:
        """Something was done there: a step, or a checkpoint. A run whose roles never started leaves its name free."""
        metrics = self.path / METRICS_FILE
        return any(self.checkpoints.glob("step-*")) or (metrics.exists() and metrics.stat().st_size > 0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the folder for this process: the lock goes with it, however it ends.

        Of a network file system this holds as far as that passes locks on.

        Raises:
            RunDirError: another process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK_FILE).open("a+")
        except OSError as error:
            raise self._unwritable(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RunDirError(
                    f"{self.path} is in use by {file.read().strip() or 'another process'}; wait for it to end, or give "
                    "this run another name (run.name=...)"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def logs(self) -> Path:
        """Logs of the ranks."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints."""
        return self.path / "checkpoints"

    @property
    def experience(self) -> Path:
        """Kept experience."""
        return self.path / "experience"

    @property
    def evaluation(self) -> Path:
        """Kept responses to held-out prompts."""
        return self.path / "evaluation"

    @property
    def best(self) -> Path:
        """The exported model of the best checkpoint."""
        return self.path / "best"

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.path / "model"

    @property
    def ema(self) -> Path:
        """The exported moving average."""
        return self.path / "ema"

    @property
    def adapter(self) -> Path:
        """The exported adapter."""
        return self.path / "adapter"
