"""Whole runs, as a user starts them, on real Ray, real vLLM and real DeepSpeed, with the shipped configurations."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from experience.table import Experience

ROOT = Path(__file__).parent.parent
Troupe = Callable[..., subprocess.CompletedProcess[str]]

#: The demo's PPO, cut short. Eight samples a minibatch on two ranks, so that some packs are empty.
PPO = (
    str(ROOT / "examples" / "ppo.yaml"),
    "run.name=ppo",
    "run.num_iterations=4",
    "run.checkpoint_every=2",
    "run.keep_checkpoints=5",
    "run.keep_experience=true",
    "online.batch_size=32",
    "online.scoring_batch_size=8",
    "algorithm.critic_warmup_iterations=1",
    "algorithm.kl.coefficient=0.1",
    "algorithm.kl.target=1.0",
    "rollout.sampling.samples_per_prompt=2",
)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learnt(row: Mapping[str, float]) -> dict[str, float]:
    """What a step learned: everything in its row but the time it took."""
    timed = ("time/", "tokens_per_s/", "driver/", "publish/time")
    return {
        name: value for name, value in row.items() if not name.startswith(timed) and "tokens_per_second" not in name
    }


def check_done(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]


def test_ppo_runs_and_resumes_as_if_it_had_not_stopped(troupe: Troupe, home: Path) -> None:
    check_done(troupe("train", *PPO))
    run = home / "runs" / "ppo"
    steps = rows(run)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    # The first iteration trains the critic alone; in the others the policy is the one that sampled, at first.
    assert "policy/loss" not in steps[0]
    for row in steps[1:]:
        assert 0 <= row["policy/first_ratio_max_deviation"] < 1e-3
        assert row["experience/staleness_max"] == 0
    assert steps[0]["kl_coefficient"] != steps[3]["kl_coefficient"]
    check_experience(run / "experience")
    check_model(run / "model")

    straight = home / "straight"
    shutil.move(run, straight)
    shutil.copytree(straight, run)
    for newer in ("step-00000003", "step-00000004"):
        shutil.rmtree(run / "checkpoints" / newer, ignore_errors=True)
    shutil.rmtree(run / "model")
    check_done(troupe("train", *PPO, "--resume"))
    again = rows(run)
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    for before, after in zip(steps[2:], again[2:], strict=True):
        assert learnt(after) == pytest.approx(learnt(before), rel=1e-3, abs=1e-4)
    tokens = [
        [Experience.open(folder / "iteration_000003.arrow").table.column("tokens").to_pylist()]
        for folder in (straight / "experience", run / "experience")
    ]
    assert tokens[0] == tokens[1]


def check_experience(folder: Path) -> None:
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"iteration_{i:06d}.arrow" for i in range(4)]
    prompts: list[int] = []
    for version, file in enumerate(files):
        experience = Experience.open(file)
        assert experience.num_rows == 32
        assert experience.metadata["policy_version"] == str(version)
        prompts += experience.table.column("prompt_id").to_pylist()
        for row in experience.table.to_pylist():
            num_response_tokens = len(row["tokens"]) - row["num_prompt_tokens"]
            assert row["policy_versions"] == [version] * num_response_tokens
            for column in ("rollout_logprobs", "ref_logprobs", "values", "advantages", "returns"):
                assert len(row[column]) == num_response_tokens
    # Every prompt once, with its two samples side by side, in the order they were drawn.
    assert prompts == [prompt for prompt in range(64) for _ in range(2)]


def check_model(folder: Path) -> None:
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(model.config.architectures[0], tokenizer.eos_token)"
    )
    loaded = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["LlamaForCausalLM", "<eos>"]


def stop(home: Path, words: Sequence[str], *, at_line: str = "", at_file: Path | None = None) -> list[str]:
    """Start a run and send it SIGTERM, at a line that begins so or once a file is there; the lines that it printed."""
    with subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=ROOT,
        env={**os.environ, "TROUPE_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        while at_file is not None and not at_file.exists():
            assert process.poll() is None, process.stdout.read()[-3000:]
            time.sleep(0.05)
        told: list[str] = []
        while at_line and not (told and told[-1].startswith(at_line)):
            line = process.stdout.readline()
            assert line, "".join(told)[-3000:]
            told.append(line)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        told += process.stdout.readlines()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM, "".join(told)[-3000:]
        # A step, or the rest of the start of all roles.
        assert time.monotonic() - began < (60 if at_line else 120)
    assert "stopped by SIGTERM after step" in told[-1] and "--resume" in told[-1]
    return told


def test_generation_ahead_of_training_stays_within_its_bound_and_stops_when_asked(home: Path) -> None:
    ahead = ("online.max_staleness=1", "algorithm.recompute_logprobs=true", "algorithm.critic_warmup_iterations=0")
    # Two engines, and weights that are sharded over the policy's ranks.
    spread = ("rollout.ranks_per_node=2", "policy.zero.stage=3")
    words, run = ("train", *PPO, *ahead, *spread), home / "runs" / "ppo"
    # Stopped while its roles start, it has a checkpoint all the same, and its name is free to go on under.
    stop(home, words, at_file=run / "logs" / "policy-0.log")
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000000"]
    stop(home, [*words, "--resume"], at_line="ppo 2/")
    assert all((run / "logs" / f"rollout-{rank}.log").exists() for rank in (0, 1))
    steps = rows(run)
    # The step that was under way is done, and nothing after it.
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert (run / "checkpoints" / "step-00000003" / "manifest.json").exists()
    assert steps[0]["experience/staleness_max"] == 0
    # From the second iteration on, experience was drawn while the one before it was trained on.
    assert max(row["experience/staleness_max"] for row in steps) == 1
    assert all("experience/engine_logprob_gap_max" in row for row in steps)


@pytest.mark.slow
def test_a_run_that_is_ahead_resumes_with_what_was_ready(troupe: Troupe, home: Path) -> None:
    ahead = (*PPO, "online.max_staleness=1", "algorithm.critic_warmup_iterations=0")
    check_done(troupe("train", *ahead))
    run = home / "runs" / "ppo"
    steps = rows(run)
    checkpoint = run / "checkpoints" / "step-00000002"
    assert json.loads((checkpoint / "buffer" / "buffer.json").read_text())["chunks"], "generation was not ahead"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    check_done(troupe("train", *ahead, "--resume"))
    again = rows(run)
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    # What comes after it is drawn while this is trained on, so it depends on which of the two is faster.
    assert learnt(again[2]) == pytest.approx(learnt(steps[2]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "words", "metric"),
    [
        (
            "pretrain",
            ["data.documents=packed", "data.heldout_fraction=0.1", "learner.zero.stage=3"],
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
    assert (run / "normalisation.json").exists() == (stage == "reward")
    assert (run / "logs" / "learner-1.log").exists()


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


#: GRPO, cut short: three iterations of eight prompts with four samples, and a reference for the KL in the loss.
GRPO = (
    str(ROOT / "examples" / "methods" / "grpo.yaml"),
    "run.num_iterations=3",
    "run.checkpoint_every=2",
    "run.keep_experience=true",
    "online.batch_size=32",
    "online.scoring_batch_size=16",
    "rollout.sampling.samples_per_prompt=4",
)


def test_grpo_runs_without_a_critic_and_resumes(troupe: Troupe, home: Path) -> None:
    check_done(troupe("train", *GRPO))
    run = home / "runs" / "grpo"
    steps = rows(run)
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert not [name for name in row if name.startswith(("critic/", "experience/value"))]
        assert row["policy/first_ratio_max_deviation"] < 1e-3
        assert row["policy/ref_kl"] >= 0
        # Scores of a group are compared with each other alone.
        assert abs(row["experience/advantage"]) < 0.5 < row["experience/advantage_std"]
    experience = Experience.open(run / "experience" / "iteration_000001.arrow").table
    assert not {"values", "returns"} & set(experience.column_names)
    assert not (run / "logs" / "critic-0.log").exists()
    assert not (run / "checkpoints" / "step-00000002" / "critic").exists()
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    check_done(troupe("train", *GRPO, "--resume"))
    again = rows(run)
    assert learnt(again[2]) == pytest.approx(learnt(steps[2]), rel=1e-3, abs=1e-4)
