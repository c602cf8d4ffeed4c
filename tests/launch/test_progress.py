"""What a run shows."""

from __future__ import annotations

import io
from collections.abc import Mapping

from rich.console import Console

from launch.progress import Progress

VALUES = {
    "experience/score": 1.234,
    "experience/kl_per_sample": 0.5,
    "experience/response_tokens": 12.25,
    "tokens_per_s/rollout": 5000.0,
    "time/checkpoint_s": 0.5,
    "time/total_s": 2.0,
}


FAILURES = {"reward/tidy/failed": 2.0, "reward/tidy/failed_raised": 2.0, "reward/served/retried": 32.0}


def shown(terminal: bool, steps: list[int], log_every: int = 1, values: Mapping[str, float] = VALUES) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
    with Progress("ppo", 10, log_every=log_every, console=console) as progress:
        for step in steps:
            progress.update(step, values)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = shown(False, [1, 2]).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("ppo 1/10, ")
    assert "score 1.234, KL 0.500, length 12.2, rollout 5,000 tok/s" in lines[0]


def test_every_so_many_steps_and_always_the_last() -> None:
    assert [line.split(",")[0] for line in shown(False, [1, 2, 3, 4, 10], log_every=2).splitlines()] == [
        "ppo 2/10",
        "ppo 4/10",
        "ppo 10/10",
    ]


def test_a_live_panel_on_a_terminal() -> None:
    text = shown(True, [3])
    assert "ppo: step 3 of 10" in text
    for part in ("score", "1.234", "rollout", "5,000 tok/s", "checkpoint", "25%"):
        assert part in text


def test_what_rewards_failed_on_is_shown() -> None:
    told = ("tidy: 2 samples without a score", "served: 32 samples tried again")
    assert ", ".join(told) in shown(False, [1], values=VALUES | FAILURES)
    assert all(part in shown(True, [1], values=VALUES | FAILURES) for part in told)
    none = VALUES | dict.fromkeys(FAILURES, 0.0)
    assert "samples" not in shown(False, [1], values=none) + shown(True, [1], values=none)
