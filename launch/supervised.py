"""The supervised driver: everything that learns from a data set.

The source role draws batches in the data's order; the learner's ranks train on them. Up to ``PIPELINE_DEPTH``
updates are queued at the learner, so its ranks go from one update to the next without waiting for this process.

Invariants:

- Updates happen in order, each on the batch that the cursor named, whatever was queued.
- Nothing is drawn beyond ``num_epochs``: the last batch is what is left of them, and may be thin.
- Everything queued has been awaited before an evaluation, a checkpoint or the end, so what is saved is a state
  between two updates, and the cursor beside it is that of the next one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

from actors.learner import LearnerActor
from actors.ranking import reliability_of, without_counts
from actors.reports import TrainReport
from actors.source import SourceActor, SourceDescription
from cluster.group import Ref
from launch.config import LearnerRunConfig
from launch.recorder import Recorder, Stopwatch
from launch.reliability import RELIABILITY_FILE, write_reliability
from launch.roles import SupervisedRoles
from launch.stopping import StopRequest
from launch.supervised_state import SupervisedState

#: Updates queued at the learner: one that runs and one that waits.
PIPELINE_DEPTH = 2
#: Of held-out rows in one batch, a quarter of a gigabyte. A batch's columns take 2^31 - 1 values.
HELDOUT_TOKENS = 2**26


class SupervisedDriver:
    """Trains one model on a data set until its last update, early stopping, or a request to stop."""

    def __init__(
        self,
        config: LearnerRunConfig,
        roles: SupervisedRoles,
        data: SourceDescription,
        state: SupervisedState,
        recorder: Recorder,
        stop: StopRequest,
        folder: Path,
    ) -> None:
        self._config = config
        self._roles = roles
        self._data = data
        self._state = state
        self._recorder = recorder
        self._stop = stop
        self._folder = folder

    async def run(self) -> bool:
        """Train to the end. True where the run was stopped before it."""
        state = self._state
        if state.update == 0:
            await self._evaluate()
        stopping = False
        while not state.finished and not stopping:
            await self._train_until(state.next_pause())
            if state.evaluation_due():
                await self._evaluate()
            stopping = self._stop.requested
            if state.checkpoint_due() or stopping:
                await state.save(self._roles)
        return not state.finished

    async def _train_until(self, last: int) -> None:
        """Updates up to ``last``, the next one always queued behind the one that runs."""
        queue: deque[tuple[asyncio.Task[list[TrainReport]], str]] = deque()
        drawn, cursor = self._state.update, self._state.cursor
        size = self._config.algorithm.batch_size
        try:
            while self._state.update < last:
                while drawn < last and len(queue) < PIPELINE_DEPTH and not self._stop.requested:
                    left = SupervisedState.rows_left(self._config, self._data.num_rows, cursor)
                    batch, info = await self._roles.source.column_of(0, SourceActor.next_batch, cursor, min(size, left))
                    train = self._roles.learner.call(LearnerActor.train, drawn, self._state.num_updates, batch)
                    queue.append((asyncio.create_task(train), info.next_cursor))
                    drawn, cursor = drawn + 1, info.next_cursor
                if not queue:
                    return
                watch = Stopwatch()
                reports, next_cursor = await queue[0][0], queue[0][1]
                queue.popleft()
                watch.lap("train")
                self._state.advance(next_cursor)
                self._recorder.training(self._state.update, {"learner": reports[0]}, {}, watch)
        finally:
            for task, _ in queue:
                task.cancel()

    async def _evaluate(self) -> None:
        """Held-out loss over every held-out row, if there are any."""
        batches = await self._heldout()
        if not batches:
            return
        report = (await self._roles.learner.call(LearnerActor.evaluate, batches))[0]
        metrics = without_counts(report)
        if bins := reliability_of(report):
            write_reliability(bins, metrics["calibration_error"], self._folder / RELIABILITY_FILE)
        self._state.evaluated(metrics["loss"])
        if self._data.num_heldout_bytes:
            metrics["bits_per_byte"] = self._data.bits_per_byte(metrics["loss"])
        self._recorder.evaluation(self._state.update, metrics)

    async def _heldout(self) -> list[Ref]:
        """All held-out rows in file order, in batches within ``HELDOUT_TOKENS``; none where none are held out."""
        size = max(1, HELDOUT_TOKENS // self._data.longest_row)
        starts = range(0, self._data.num_heldout_rows, size)
        return [(await self._roles.source.column_of(0, SourceActor.heldout, start, size))[0] for start in starts]
