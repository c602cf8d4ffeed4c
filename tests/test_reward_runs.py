"""A run without a reward model: a checker and a function as rewards, and a row that one of them fails on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experience.table import Experience
from tests.running import ROOT, Troupe, check_done, rows

FUNCTION = """\
def tidy(response: str, faulty: bool) -> float:
    if faulty:
        raise ValueError("nobody knows")
    return -0.01 * len(response)
"""
REWARDS = """\
{right: {kind: checker, check: {name: exact}, cpus_per_rank: 0.5},
 tidy: {kind: function, path: tidy.py:tidy, num_retries: 1, retry_wait_s: 0.01, cpus_per_rank: 0.5}}"""
WORDS = (
    str(ROOT / "examples" / "methods" / "dr_grpo.yaml"),
    "run.name=rewards",
    "run.num_iterations=3",
    "run.keep_experience=true",
    "data.train=prompts.jsonl",
    "data.keep_columns=[answer, faulty]",
    "online.batch_size=12",
    "online.scoring_batch_size=4",
    "rollout.sampling.samples_per_prompt=2",
    "reward=null",
    f"rewards={REWARDS}",
    "total={combine: {kind: linear, weights: {right: 1, tidy: 2}}, shaping: {eos: {kind: missing_eos, penalty: 0.5}}}",
)


def test_checker_and_function_as_rewards(troupe: Troupe, home: Path) -> None:
    """An epoch has 16 prompts and three iterations take 18, so the one that is not scored is drawn at least once."""
    answers = [json.loads(line) for line in (home / "runs" / "demo-data" / "heldout.jsonl").read_text().splitlines()]
    prompts = [{**row, "faulty": at == 5} for at, row in enumerate(answers[:16])]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (home / "tidy.py").write_text(FUNCTION)
    checked = troupe("check", *WORDS)
    assert "rewards.tidy" in checked.stdout and "can run" in checked.stdout, checked.stdout
    check_done(troupe("train", *WORDS))
    run = home / "runs" / "rewards"
    steps = rows(run)
    dropped = sum(row["experience/dropped_prompts"] for row in steps)
    assert dropped in (1, 2) and dropped == sum(row.get("dropped/reward_raised", 0) for row in steps)
    assert sum(row["reward/tidy/failed"] for row in steps) == 2 * dropped
    assert sum(row["reward/tidy/retried"] for row in steps) == 2 * dropped
    assert all(row["reward/right/failed"] == 0 for row in steps)
    said = (run / "logs" / "tidy-0.log").read_text()
    assert "has no score (raised: ValueError: nobody knows) and is dropped" in said
    for iteration, row in enumerate(steps):
        table = Experience.open(run / "experience" / f"iteration_{iteration:06d}.arrow").table
        assert table.num_rows == 12
        right, tidy = (table.column(f"score_{name}").to_pylist() for name in ("right", "tidy"))
        combined = [a + 2 * b for a, b in zip(right, tidy, strict=True)]
        assert table.column("score").to_pylist() == pytest.approx(combined)
        assert row["reward/tidy"] == pytest.approx(sum(tidy) / 12)
        assert row["experience/score"] == row["reward/combined"] == pytest.approx(sum(combined) / 12, rel=1e-5)
        unfinished = table.column("finish_reason").to_pylist().count("length")
        assert row["reward/eos"] == pytest.approx(-0.5 * unfinished / 12)
        assert row["experience/shaped_score"] == pytest.approx(row["reward/combined"] + row["reward/eos"])
