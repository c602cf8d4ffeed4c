"""Several ways to do the same work, timed in turn, and what each takes of one of them.

Ways are run in turn (A B A B), so that what else the machine does meets all of them alike, and a ratio is the median
of the ratios within each round. The processor time of the processes that do the work stands beside the wall time: on
a busy machine it is the steadier of the two.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Timing:
    """One run of one way. ``cpu_s`` is of all threads of the processes at work."""

    wall_s: float
    cpu_s: float


class Trial:
    """Timings of several ways to do ``num_units`` of the same work."""

    def __init__(self, unit: str, num_units: float) -> None:
        self._unit = unit
        self._num_units = num_units
        self._timings: dict[str, list[Timing]] = defaultdict(list)

    @contextmanager
    def time(self, way: str, pids: Iterable[int] = ()) -> Iterator[None]:
        """Time the block as one run of ``way``, done by this process and by ``pids``."""
        others = tuple(pids)
        cpu_began, began = cpu_seconds(others), time.perf_counter()
        yield
        wall_s = time.perf_counter() - began
        self._timings[way].append(Timing(wall_s, cpu_seconds(others) - cpu_began))

    def report(self, baseline: str) -> None:
        """Print a line for each way: median times, units a second, and speed as a share of the baseline's."""
        print(f"\n{'':44} {'wall s':>9} {'(least)':>9} {'CPU s':>9} {self._unit + '/s':>14} {'speed':>7} {'by CPU':>7}")
        for way, timings in self._timings.items():
            wall_s = statistics.median(timing.wall_s for timing in timings)
            cpu_s = statistics.median(timing.cpu_s for timing in timings)
            least = min(timing.wall_s for timing in timings)
            wall, cpu = self.ratio(way, baseline)
            print(
                f"{way:44} {wall_s:9.4f} {least:9.4f} {cpu_s:9.4f} {self._num_units / wall_s:14,.0f} "
                f"{wall:7.3f} {cpu:7.3f}"
            )
        print(f"speed: median of {len(self._timings[baseline])} rounds, as a share of '{baseline}'", flush=True)

    def ratio(self, way: str, baseline: str) -> tuple[float, float]:
        """Speed of ``way`` as a share of the baseline's, by wall time and by processor time."""
        rounds = list(zip(self._timings[way], self._timings[baseline], strict=True))
        wall = statistics.median(base.wall_s / own.wall_s for own, base in rounds)
        cpu = statistics.median(base.cpu_s / own.cpu_s if own.cpu_s else float("nan") for own, base in rounds)
        return wall, cpu


def cpu_seconds(others: Iterable[int] = ()) -> float:
    """Processor time so far of this process and of ``others``."""
    return time.process_time() + sum(process_cpu_s(pid) for pid in others)


def process_cpu_s(pid: int) -> float:
    """Processor time of a process's threads, those that ended included."""
    fields = stat_fields(Path(f"/proc/{pid}/stat"))
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def stat_fields(path: Path) -> list[str]:
    """The fields of a process's or thread's ``stat``, from its state on: the name before may hold blanks."""
    return path.read_text().rpartition(")")[2].split()


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and that those did; the ones that are ending are left out."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                children[int(stat_fields(folder / "stat")[1])].append(int(folder.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found: list[int] = []
    waiting = [pid]
    while waiting:
        started = children[waiting.pop()]
        found += started
        waiting += started
    return found


def print_setting(what: str, setting: Mapping[str, object]) -> None:
    """Say what is measured, on what machine and under what load."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{what}\n  machine: {os.cpu_count()} cores, load average {load}")
    for name, value in setting.items():
        print(f"  {name}: {value}")
