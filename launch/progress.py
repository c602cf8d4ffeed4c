"""What a run shows while it runs: a live panel on a terminal, a plain line a step where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

#: What the plain line says, where a step has it: label, metric, format.
HEADLINES = (
    ("score", "experience/score", ".3f"),
    ("KL", "experience/kl_per_sample", ".3f"),
    ("length", "experience/response_tokens", ".1f"),
    ("truncated", "experience/truncated_fraction", ".1%"),
    ("loss", "learner/loss", ".4f"),
    ("accuracy", "learner/accuracy", ".1%"),
    ("right way round", "learner/reward_accuracy", ".1%"),
    ("margin", "learner/reward_margin", ".3f"),
    ("held-out loss", "heldout/loss", ".4f"),
    ("held-out accuracy", "heldout/accuracy", ".1%"),
    ("held-out right way round", "heldout/reward_accuracy", ".1%"),
    ("held-out score", "evaluation/score", ".3f"),
    ("pass@1", "evaluation/pass_at_1", ".1%"),
    ("held-out length", "evaluation/response_tokens", ".1f"),
    ("held-out truncated", "evaluation/truncated_fraction", ".1%"),
    ("ratio off by", "policy/first_ratio_max_deviation", ".1e"),
)


class Progress:
    """Shows the steps of one stage; use it as a context manager.

    Args:
        stage: what is being done, such as ``ppo``.
        num_steps: iterations (or updates) in all.
        first_step: those already done.
        log_every: steps between plain lines.
        console: where to write; none means standard output.
    """

    def __init__(
        self, stage: str, num_steps: int, *, first_step: int = 0, log_every: int = 1, console: Console | None = None
    ) -> None:
        self._stage = stage
        self._num_steps = num_steps
        self._first_step = self._step = first_step
        self._log_every = log_every
        self._console = console or Console(highlight=False)
        self._values: dict[str, float] = {}
        self._began = time.monotonic()
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that ``step`` is done, and what its metrics are."""
        self._step = step
        self._values |= values
        if self._live is not None:
            self._live.update(self._panel())
            return
        evaluated = any(name.startswith(("heldout/", "evaluation/")) for name in values)
        if evaluated or step % self._log_every == 0 or step == self._num_steps:
            self._console.print(self._line(values), soft_wrap=True)

    def _line(self, values: Mapping[str, float]) -> str:
        told = [f"{label} {values[name]:{form}}" for label, name, form in HEADLINES if name in values]
        told += _failures(values)
        speed = [f"{name.removeprefix('tokens_per_s/')} {values[name]:,.0f} tok/s" for name in _speeds(values)]
        return f"{self._stage} {self._step}/{self._num_steps}, {self._left()} left: {', '.join([*told, *speed])}"

    def _left(self) -> str:
        done = self._step - self._first_step
        if not done:
            return "?"
        seconds = (time.monotonic() - self._began) / done * (self._num_steps - self._step)
        return str(timedelta(seconds=round(seconds)))

    def _panel(self) -> Panel:
        values = self._values
        facts = Table.grid(padding=(0, 2))
        for label, name, form in HEADLINES:
            if name in values:
                facts.add_row(label, f"{values[name]:{form}}")
        speeds = Table.grid(padding=(0, 2))
        for name in _speeds(values):
            speeds.add_row(name.removeprefix("tokens_per_s/"), f"{values[name]:,.0f} tok/s")
        times = Table.grid(padding=(0, 2))
        total = values.get("time/total_s", 0.0)
        for name in sorted(values):
            if name.startswith("time/") and name != "time/total_s" and total:
                label = name.removeprefix("time/").removesuffix("_s").replace("_", " ")
                times.add_row(label, f"{values[name]:.2f} s", f"{values[name] / total:.0%}")
        columns = Table.grid(padding=(0, 4))
        columns.add_row(facts, speeds, times)
        rows = Table.grid()
        rows.add_row(ProgressBar(total=self._num_steps, completed=self._step, width=60))
        rows.add_row(columns)
        for failure in _failures(values):
            rows.add_row(failure)
        title = f"{self._stage}: step {self._step} of {self._num_steps}, {self._left()} left"
        return Panel(rows, title=title, title_align="left")


def _failures(values: Mapping[str, float]) -> list[str]:
    """What rewards failed on in this step, by the metrics of ``launch.labelling``; nothing where nothing did."""
    told = []
    for metric, what in (("failed", "without a score"), ("retried", "tried again")):
        for name in sorted(values):
            if name.startswith("reward/") and name.endswith(f"/{metric}") and values[name]:
                told.append(f"{name.split('/')[1]}: {values[name]:.0f} samples {what}")
    return told


def _speeds(values: Mapping[str, float]) -> list[str]:
    return sorted(name for name in values if name.startswith("tokens_per_s/"))
