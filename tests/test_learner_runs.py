"""Whole runs that learn from a data set, as a user starts them, on real Ray and real DeepSpeed."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from tests.running import ROOT, Troupe, check_done, rows, stop

pytestmark = pytest.mark.timeout(600)

STOPS_EARLY = ("algorithm.evaluate_every=2", "algorithm.early_stopping_patience=2")


@pytest.mark.parametrize(
    ("stage", "words", "metric"),
    [
        (
            "pretrain",
            ["data.documents=packed", "data.heldout_fraction=0.1", "learner.zero.stage=3", *STOPS_EARLY],
            "heldout/perplexity",
        ),
        ("reward", ["normalise=demonstrations"], "heldout/accuracy"),
    ],
)
def test_a_supervised_stage(troupe: Troupe, home: Path, stage: str, words: list[str], metric: str) -> None:
    config = str(ROOT / "examples" / f"{stage}.yaml")
    check_done(troupe("train", config, f"run.name={stage}", "run.num_iterations=4", "algorithm.batch_size=8", *words))
    run = home / "runs" / stage
    assert metric in rows(run)[-1]
    assert (run / "model" / "model.safetensors").exists()
    assert (run / "best" / "model.safetensors").exists() == (stage == "pretrain")
    assert (run / "normalisation.json").exists() == (stage == "reward")
    assert (run / "logs" / "learner-1.log").exists()


@pytest.mark.slow
def test_a_reference_is_gone_before_the_learner_comes(troupe: Troupe, home: Path) -> None:
    """Each takes more than half of the CPUs. What it left, a run whose learner is its own reference finds."""
    config = str(ROOT / "examples" / "methods" / "dpo_reference.yaml")
    words = ("run.num_iterations=1", "algorithm.batch_size=8", "algorithm.evaluate_every=null")
    cpus = float(os.cpu_count() or 1)
    each = [f"{role}.cpus_per_rank={0.6 * cpus / 2}" for role in ("learner", "reference")]
    model = "reference.model.path=runs/demo-sft/model"
    check_done(troupe("train", config, "run.name=first", *words, *each, model))
    (file,) = (home / "runs" / ".reference-logprobs").iterdir()
    written = file.stat().st_mtime_ns
    assert (home / "runs" / "first" / "logs" / "reference-1.log").exists()
    check_done(troupe("train", str(ROOT / "examples" / "dpo.yaml"), "run.name=second", *words))
    assert [file] == list((home / "runs" / ".reference-logprobs").iterdir())
    assert file.stat().st_mtime_ns == written
    for name in ("first", "second"):
        step = next(row for row in rows(home / "runs" / name) if "learner/loss" in row)
        assert step["learner/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert step["learner/reward_margin"] == pytest.approx(0, abs=1e-6)
    # It does not go on compared with another.
    others = ("learner.model.attention=eager", "run.num_iterations=2", "--resume")
    refused = troupe("train", str(ROOT / "examples" / "dpo.yaml"), "run.name=second", words[1], words[2], *others)
    assert refused.returncode == 1
    told = " ".join(refused.stderr.split())
    assert "the reference is not the one that" in told
    assert "step-00000001 was made with: what is at learner.model.path (" in told
    assert "resume with another run.num_iterations: 1 -> 2" in told


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint_to_go_on_from(troupe: Troupe, home: Path) -> None:
    config = str(ROOT / "examples" / "sft.yaml")
    model = "learner.model.path=runs/demo-sft/model"
    words = ("train", config, model, "run.name=sft", "run.log_every=1", "algorithm.num_epochs=500")
    stop(home, words, at_line="sft 5/")
    stopped_at = rows(home / "runs" / "sft")[-1]["step"]
    (checkpoint,) = (home / "runs" / "sft" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{int(stopped_at):08d}"
    check_done(troupe(*words, f"run.num_iterations={int(stopped_at) + 3}", "--resume"))
    steps = [row["step"] for row in rows(home / "runs" / "sft") if "learner/loss" in row]
    assert steps == list(range(1, int(stopped_at) + 4))
