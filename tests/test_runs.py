"""Whole online runs, as a user starts them, on real Ray, vLLM and DeepSpeed, with the shipped configurations."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from safetensors.numpy import load_file

from experience.table import Experience, open_table
from tests.running import PPO, ROOT, Troupe, check_done, learnt, rows, stop

#: Starting all roles takes half a minute, and several times that beside other work.
pytestmark = pytest.mark.timeout(900)


#: Four held-out prompts before, amid and after, by the reward model and by a checker; the first evaluation is the best.
EVALUATED = (
    "data.heldout=runs/demo-data/heldout.jsonl",
    "evaluation.every=2",
    "evaluation.num_prompts=4",
    "evaluation.samples_per_prompt=2",
    "evaluation.best_by={metric: sorted/unscored_fraction, mode: min}",
    "evaluation.checkers={sorted: {kind: checker, cpus_per_rank: 0.25, check: {name: regex, pattern: '[0-9]'}}}",
)


def test_ppo_runs_and_resumes_as_if_it_had_not_stopped(troupe: Troupe, home: Path) -> None:
    check_done(troupe("train", *PPO, *EVALUATED))
    run = home / "runs" / "ppo"
    check_evaluation(run)
    steps = [row for row in rows(run) if "experience/score" in row]
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
    check_done(troupe("train", *PPO, *EVALUATED, "--resume"))
    check_evaluation(run)
    assert rows(run)[-1] == pytest.approx(rows(straight)[-1], rel=1e-3, abs=1e-4), "the same prompts and seeds"
    again = [row for row in rows(run) if "experience/score" in row]
    assert [row["step"] for row in again] == [1, 2, 3, 4]
    for before, after in zip(steps[2:], again[2:], strict=True):
        assert learnt(after) == pytest.approx(learnt(before), rel=1e-3, abs=1e-4)
    tokens = [
        [Experience.open(folder / "iteration_000003.arrow").table.column("tokens").to_pylist()]
        for folder in (straight / "experience", run / "experience")
    ]
    assert tokens[0] == tokens[1]


def check_evaluation(run: Path) -> None:
    before, _, after = evaluations = [row for row in rows(run) if "evaluation/score" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert before["evaluation/unscored_fraction"] == before["evaluation/unanswered_fraction"] == 0
    assert before["evaluation/best_of_2"] >= before["evaluation/score"] != after["evaluation/score"]
    assert 0 <= before["evaluation/sorted/pass_at_1"] <= before["evaluation/sorted/pass_at_2"] <= 1
    first, last = [open_table(run / "evaluation" / f"iteration_{at:06d}.arrow") for at in (0, 4)]
    assert first.column("prompt").to_pylist() == last.column("prompt").to_pylist()
    assert [set(table.column("policy_version").to_pylist()) for table in (first, last)] == [{0}, {4}]
    assert fmean(first.column("score").to_pylist()) == pytest.approx(before["evaluation/score"], abs=1e-5)
    assert json.loads((run / "checkpoints" / "best.json").read_text())["checkpoint"] == "step-00000000"
    # What began is what was best: the weights of the SFT model, read back from its checkpoint.
    began = load_file(run.parent / "demo-sft" / "model" / "model.safetensors")
    best = load_file(run / "best" / "model.safetensors")
    assert all(np.array_equal(best[name], weights) for name, weights in began.items())
    trained = load_file(run / "model" / "model.safetensors")
    assert not all(np.array_equal(trained[name], weights) for name, weights in began.items())


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


@pytest.mark.slow
def test_generation_ahead_of_training_stays_within_its_bound_and_stops_when_asked(home: Path) -> None:
    corrected = "algorithm.correction.method=truncated"
    ahead = ("online.max_staleness=1", corrected, "algorithm.critic_warmup_iterations=0")
    # Two engines, and weights that are sharded over the policy's ranks.
    spread = ("rollout.ranks_per_node=2", "policy.zero.stage=3")
    # The reference is the policy's average, of which each rank has its shards.
    average = ("policy.ema_decay=0.9", "policy.ema_is_reference=true", "reference=null")
    words, run = ("train", *PPO, *ahead, *spread, *average), home / "runs" / "ppo"
    # Stopped while its roles start, it has a checkpoint all the same, and its name is free to go on under.
    stop(home, words, at_file=run / "logs" / "policy-0.log")
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000000"]
    stop(home, [*words, "--resume"], at_line="ppo 2/")
    assert all((run / "logs" / f"rollout-{rank}.log").exists() for rank in (0, 1))
    steps = rows(run)
    # The step that was under way is done, if one was, and nothing after it.
    last = len(steps)
    assert [row["step"] for row in steps] == list(range(1, last + 1)) and last in (2, 3)
    assert (run / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
    assert steps[0]["experience/staleness_max"] == 0
    # From the second iteration on, experience was drawn while the one before it was trained on.
    assert max(row["experience/staleness_max"] for row in steps) == 1
    assert all("experience/engine_logprob_gap_max" in row for row in steps)
    # At first the average is the policy that drew.
    assert abs(steps[0]["experience/kl_per_token"]) < 1e-5 < abs(steps[-1]["experience/kl_per_token"])


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


@pytest.mark.slow
def test_grpo_runs_without_a_critic(troupe: Troupe, home: Path) -> None:
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


@pytest.mark.slow
def test_grpo_resumes(troupe: Troupe, home: Path) -> None:
    check_done(troupe("train", *GRPO))
    run = home / "runs" / "grpo"
    steps = rows(run)
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    check_done(troupe("train", *GRPO, "--resume"))
    again = rows(run)
    assert learnt(again[2]) == pytest.approx(learnt(steps[2]), rel=1e-3, abs=1e-4)
