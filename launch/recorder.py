"""Puts together what the roles report into one row of metrics an iteration, and shows it.

Names are ``group/metric_unit``. ``time/...`` says where an iteration's wall time went as this process saw it;
``tokens_per_s/...`` is of the time that a role was busy; ``driver/cpu_share`` is the processor time that this
process took as a share of the wall time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

from actors.reports import TrainReport
from launch.metrics import MetricsWriter
from launch.progress import Progress


class Stopwatch:
    """Wall time since it was made, cut into named laps."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._cpu_began = time.process_time()
        self.laps: dict[str, float] = defaultdict(float)

    def lap(self, name: str) -> None:
        """Give the time since the last lap the name ``name``."""
        now = time.perf_counter()
        self.laps[name] += now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """The laps, their sum, and this process's share of it."""
        total = time.perf_counter() - self._began
        cpu = time.process_time() - self._cpu_began
        laps = {f"time/{name}_s": seconds for name, seconds in self.laps.items()}
        return {**laps, "time/total_s": total, "driver/cpu_share": cpu / total if total else 0.0}


class Recorder:
    """Collects an iteration's numbers and hands them to the run's files and to the terminal."""

    def __init__(self, writer: MetricsWriter, progress: Progress) -> None:
        self._writer = writer
        self._progress = progress
        self._tokens: dict[str, int] = defaultdict(int)
        self._busy_s: dict[str, float] = defaultdict(float)
        self._extra: dict[str, float] = {}

    def count(self, role: str, num_tokens: int, seconds: float) -> None:
        """``role`` was busy for ``seconds`` with ``num_tokens`` tokens."""
        self._tokens[role] += num_tokens
        self._busy_s[role] += seconds

    def published(self, num_bytes: int, seconds: float) -> None:
        """Weights of ``num_bytes`` reached every engine in ``seconds``."""
        self._extra = {"publish/time_s": seconds, "publish/weights_bytes": float(num_bytes)}

    def training(
        self, step: int, reports: Mapping[str, TrainReport], extra: Mapping[str, float], watch: Stopwatch
    ) -> None:
        """The row of one iteration (or supervised update)."""
        values = {**extra, **self._extra}
        for role, report in reports.items():
            self.count(role, report.num_tokens, report.seconds)
            values |= {f"{role}/{name}": value for name, value in report.metrics.items()}
        for role, tokens in self._tokens.items():
            if self._busy_s[role] > 0:
                values[f"tokens_per_s/{role}"] = tokens / self._busy_s[role]
        self._tokens.clear()
        self._busy_s.clear()
        values |= watch.metrics()
        self._writer.write(step, values)
        self._progress.update(step, values)

    def evaluation(self, step: int, metrics: Mapping[str, float], group: str = "heldout") -> None:
        """The row of an evaluation after update (or iteration) ``step``."""
        values = {f"{group}/{name}": value for name, value in metrics.items()}
        self._writer.write(step, values)
        self._progress.update(step, values)
