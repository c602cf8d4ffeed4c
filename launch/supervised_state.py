"""Where a supervised run stands between two updates: what its checkpoint holds beside the learner's own state."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from actors.learner import LearnerActor
from data.order import Cursor
from launch.config import LearnerRunConfig

if TYPE_CHECKING:
    from launch.checkpoint import CheckpointStore
    from launch.roles import SupervisedRoles

STATE_FILE = "state.json"


@dataclass
class SupervisedProgress:
    """The part that is written down: ``cursor`` is of the batch that update number ``update`` will train on.

    ``fingerprint`` is of the data that the cursor points into, ``models`` are digests of those that the checkpoint
    does not hold: of the reference, and of the learner's base where it has an adapter.
    """

    update: int
    cursor: str
    fingerprint: str
    best_loss: float | None = None
    evaluations_since_best: int = 0
    best_update: int | None = None
    models: dict[str, str] = field(default_factory=dict)


class SupervisedState:
    """Counts updates and decides when to evaluate, to save and to stop."""

    def __init__(
        self, config: LearnerRunConfig, store: CheckpointStore, progress: SupervisedProgress, num_updates: int
    ) -> None:
        self._config = config
        self._store = store
        self._progress = progress
        self.num_updates = num_updates

    @staticmethod
    def planned_updates(
        config: LearnerRunConfig, num_rows: int, progress: SupervisedProgress | None = None
    ) -> int:
        """Updates of the whole run: those that ``num_epochs`` over ``num_rows`` rows give, or ``run.num_iterations``.

        The last one may have fewer rows than the others: those that are left.

        Args:
            progress: where a resumed run stands; from there on it goes by what ``config`` says now.
        """
        progress = progress or SupervisedProgress(0, Cursor().to_json(), "")
        left = SupervisedState.rows_left(config, num_rows, progress.cursor)
        updates = progress.update + math.ceil(left / config.algorithm.batch_size)
        return min(updates, config.run.num_iterations or updates)

    @staticmethod
    def rows_left(config: LearnerRunConfig, num_rows: int, cursor: str) -> int:
        """Rows of the ``num_epochs``, in all at least one, that are not drawn yet at ``cursor``."""
        planned = max(1, round(config.algorithm.num_epochs * num_rows))
        return max(0, planned - Cursor.from_json(cursor).drawn)

    @staticmethod
    def read(checkpoint: Path) -> SupervisedProgress:
        """The progress that a checkpoint holds."""
        return SupervisedProgress(**json.loads((checkpoint / STATE_FILE).read_text()))

    @property
    def update(self) -> int:
        """Updates done."""
        return self._progress.update

    @property
    def cursor(self) -> str:
        """The place in the data that the next update starts from."""
        return self._progress.cursor

    @property
    def finished(self) -> bool:
        """All updates are done, or held-out loss has stopped falling."""
        patience = self._config.algorithm.early_stopping_patience
        converged = patience is not None and self._progress.evaluations_since_best >= patience
        return self.update >= self.num_updates or converged

    @property
    def best(self) -> int | None:
        """Where training may stop early, the update after which held-out loss was least; none where that is the start.

        Its checkpoint is kept.
        """
        return None if self._config.algorithm.early_stopping_patience is None else self._progress.best_update or None

    def advance(self, next_cursor: str) -> None:
        """One more update is done."""
        self._progress.update += 1
        self._progress.cursor = next_cursor

    def evaluated(self, loss: float) -> None:
        """Take note of a held-out loss."""
        if self._progress.best_loss is None or loss < self._progress.best_loss:
            self._progress.best_loss, self._progress.evaluations_since_best = loss, 0
            self._progress.best_update = self.update
        else:
            self._progress.evaluations_since_best += 1

    def next_pause(self) -> int:
        """The update after which something is due: an evaluation, a checkpoint, or the end."""
        periods = (self._config.algorithm.evaluate_every, self._config.run.checkpoint_every)
        pauses = [(self.update // period + 1) * period for period in periods if period]
        return min([self.num_updates, *pauses])

    def evaluation_due(self) -> bool:
        """An evaluation belongs after the update that was last done."""
        return self._due(self._config.algorithm.evaluate_every)

    def checkpoint_due(self) -> bool:
        """A checkpoint belongs after the update that was last done."""
        return self._due(self._config.run.checkpoint_every) or self.finished or self.best == self.update

    def _due(self, period: int | None) -> bool:
        return self.update >= self.num_updates or bool(period and self.update and self.update % period == 0)

    async def save(self, roles: SupervisedRoles) -> None:
        """Write a checkpoint: the learner's ranks their states, this process its progress."""
        with self._store.writing(self.update, best=self.best) as folder:
            await roles.learner.call(LearnerActor.save, folder / "learner")
            (folder / STATE_FILE).write_text(json.dumps(asdict(self._progress)))
