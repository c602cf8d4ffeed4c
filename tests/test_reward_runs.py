"""Runs whose rewards fail in every way that functions do, and runs of every kind of reward."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from actors.errors import RewardError
from actors.rewards.config import CodeRewardConfig
from actors.rewards.sandbox import Sandbox
from experience.table import Experience
from tests.running import ROOT, Troupe, check_done, rows, served

EXAMPLES = ROOT / "examples" / "rewards"

FUNCTIONS = """\
import os, time

def tidy(response: str, faulty: str) -> object:
    match faulty:
        case "raises":
            raise ValueError("nobody knows")
        case "nan":
            return float("nan")
        case "shape":
            return [1.0]
        case "hangs":
            time.sleep(60)
        case "dies":
            os._exit(3)
    return -0.01 * len(response)

def paired(response: list[str], faulty: list[str]) -> list[float]:
    return [0.5] * (len(response) - ("short" in faulty))
"""
#: What the rows of some prompts have as `faulty`, the reward that it makes fail, and how.
FAULTS = {
    "raises": ("tidy", "raised"),
    "nan": ("tidy", "not_finite"),
    "shape": ("tidy", "wrong_type"),
    "hangs": ("tidy", "timed_out"),
    "dies": ("tidy", "crashed"),
    "short": ("paired", "wrong_length"),
}
REWARDS = """\
{right: {kind: checker, check: {name: exact}, cpus_per_rank: 0.5},
 tidy: {kind: function, path: functions.py:tidy, num_workers: 2, timeout_s: 2, num_retries: 1, retry_wait_s: 0.01,
        cpus_per_rank: 0.5},
 paired: {kind: function, path: functions.py:paired, batched: true, batch_size: 2, num_retries: 1, retry_wait_s: 0.01,
          cpus_per_rank: 0.5}}"""
WORDS = (
    str(ROOT / "examples" / "methods" / "dr_grpo.yaml"),
    "run.name=rewards",
    "run.num_iterations=2",
    "run.keep_experience=true",
    "data.train=prompts.jsonl",
    "data.keep_columns=[answer, faulty]",
    "online.batch_size=12",
    "online.scoring_batch_size=4",
    "policy.ranks_per_node=1",
    "rollout.sampling.samples_per_prompt=2",
    "reward=null",
    f"rewards={REWARDS}",
    "total={combine: {kind: linear, weights: {right: 1, tidy: 2, paired: 1}}, "
    "shaping: {eos: {kind: missing_eos, penalty: 0.5}}}",
)


def written(path: Path, prompts: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))


def heldout(home: Path, number: int) -> list[dict[str, Any]]:
    lines = (home / "runs" / "demo-data" / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:number]]


def kept(run: Path, iteration: int) -> pa.Table:
    return Experience.open(run / "experience" / f"iteration_{iteration:06d}.arrow").table


def total(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row.get(name, 0.0) for row in steps)


@pytest.mark.slow
def test_checker_and_functions_as_rewards(troupe: Troupe, home: Path) -> None:
    """Two iterations take 12 good prompts; an epoch has 10, and one of each fault: each is drawn once or twice."""
    faulty = dict(enumerate(FAULTS, start=3))
    written(home / "prompts.jsonl", [{**row, "faulty": faulty.get(at, "")} for at, row in enumerate(heldout(home, 16))])
    (home / "functions.py").write_text(FUNCTIONS)
    finished = troupe("train", *WORDS)
    check_done(finished)
    run = home / "runs" / "rewards"
    steps = rows(run)
    for name, reason in FAULTS.values():
        dropped = total(steps, f"dropped/reward_{reason}")
        assert dropped in (1, 2), reason
        # Both samples of the prompt, each tried twice; on a busy machine a call that is fine may be late as well.
        assert total(steps, f"reward/{name}/failed_{reason}") == 2 * dropped
        assert total(steps, f"reward/{name}/tries_failed_{reason}") >= 4 * dropped
    num_dropped = total(steps, "experience/dropped_prompts")
    assert 6 <= num_dropped <= 12
    assert total(steps, "reward/tidy/failed") + total(steps, "reward/paired/failed") == 2 * num_dropped
    assert total(steps, "reward/right/failed") == 0
    assert "samples without a score" in finished.stdout
    said = (run / "logs" / "tidy-0.log").read_text()
    assert "has no score (raised: ValueError: nobody knows) and is dropped" in said
    for iteration, row in enumerate(steps):
        table = kept(run, iteration)
        assert table.num_rows == 12
        right, tidy, paired = (table.column(f"score_{name}").to_pylist() for name in ("right", "tidy", "paired"))
        assert paired == [0.5] * 12 and max(tidy) < 0
        combined = [a + 2 * b + 0.5 for a, b in zip(right, tidy, strict=True)]
        assert table.column("score").to_pylist() == pytest.approx(combined)
        assert row["reward/tidy"] == pytest.approx(sum(tidy) / 12)
        assert row["experience/score"] == row["reward/combined"] == pytest.approx(sum(combined) / 12, rel=1e-5)
        unfinished = table.column("finish_reason").to_pylist().count("length")
        assert row["reward/eos"] == pytest.approx(-0.5 * unfinished / 12)
        assert row["experience/shaped_score"] == pytest.approx(row["reward/combined"] + row["reward/eos"])


SMALL = ("run.keep_experience=true", "online.batch_size=32", "online.scoring_batch_size=16")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_service_that_loses_an_endpoint_in_mid_run(troupe: Troupe, home: Path) -> None:
    """One of two servers is killed behind the first step; the other one scores what both would have scored."""
    model, run = home / "runs" / "demo-reward" / "model", home / "runs" / "lost"
    with served(model, home / "one.log") as (one, _), served(model, home / "two.log") as (two, leaving):

        def kill() -> None:
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
                time.sleep(0.02)
            leaving.kill()

        Thread(target=kill, daemon=True).start()
        service = f"endpoints: ['{one}', '{two}'], batch_size: 4, backoff_s: 0.05, num_failures_to_open: 2"
        words = (str(EXAMPLES / "http.yaml"), "run.name=lost", "run.num_iterations=4", *SMALL)
        finished = troupe("train", *words, f"reward={{kind: http, {service}, cooldown_s: 1, cpus_per_rank: 0.5}}")
        check_done(finished)
    steps = rows(run)
    assert len(steps) == 4
    assert total(steps, "reward/reward/failed") == total(steps, "experience/dropped_prompts") == 0
    assert steps[0]["reward/reward/retried"] == 0
    retried = total(steps, "reward/reward/retried")
    assert retried and retried == total(steps, "reward/reward/tries_failed_unreachable")
    assert f"{retried:.0f} samples tried again" in finished.stdout or finished.stdout.count("samples tried again") > 1
    said = (run / "logs" / "reward-0.log").read_text()
    assert f"{two}: " in said and "4 samples are sent again" in said
    assert f"{two} failed 2 times in a row: it is left alone" in said and f"{one} failed" not in said


#: Every token of the policy's that is no prompt is a whole response; their scores by the tests of `written_code`.
RESPONSES = {
    "```python\ndef double(n):\n    return 2 * n\n```": 1.0,
    "```python\ndef double(n):\n    return n\n```": 0.5,
    "```python\nwhile True:\n    pass\n```": 0.0,
    "```python\nimport time\ntime.sleep(60)\n```": 0.0,
    "```python\neaten = [bytes(1 << 20) for _ in range(1 << 20)]\n```": 0.0,
    "```python\nwhile True:\n    print('x' * 1000)\n```": 0.0,
    "```python\nimport os\nos._exit(0)\n```": 0.0,
    "```python\n1 / 0\n```": 0.0,
    "```python\ndef double(n:\n```": 0.0,
    "prose": 0.0,
}
TESTS = ["assert double(2) == 4", "assert double(0) == 0"]
NUM_PROMPTS = 8
CODER = """
import json, sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
folder, words = sys.argv[1], json.loads(sys.argv[2])
core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer, core.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<pad>"}
PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **special).save_pretrained(folder)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)
LlamaForCausalLM(config).save_pretrained(folder)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_code_of_a_policy_that_writes_programs(troupe: Troupe, home: Path) -> None:
    """Some loop, sleep, eat memory or print for ever: that is a score. A row without tests is what is dropped."""
    try:
        Sandbox(CodeRewardConfig())
    except RewardError as error:
        pytest.skip(str(error))
    words = ["<pad>", "<eos>", *(str(number) for number in range(NUM_PROMPTS)), *RESPONSES]
    subprocess.run([sys.executable, "-c", CODER, str(home / "coder"), json.dumps(words)], check=True)
    prompts = [{"prompt": str(number), "tests": TESTS if number else []} for number in range(NUM_PROMPTS)]
    written(home / "code.jsonl", prompts)
    finished = troupe(
        "train",
        str(EXAMPLES / "code.yaml"),
        "run.name=code",
        "run.num_iterations=2",
        *SMALL,
        "data.train=code.jsonl",
        "policy.model.path=coder",
        "reward.timeout_s=2",
        "reward.memory_bytes=268435456",
        "rollout.sampling.max_response_tokens=1",
    )
    check_done(finished)
    run = home / "runs" / "code"
    steps = rows(run)
    dropped = total(steps, "experience/dropped_prompts")
    assert dropped in (1, 2) and dropped == total(steps, "dropped/reward_bad_row")
    assert total(steps, "reward/reward/failed") == total(steps, "reward/reward/failed_bad_row") == 8 * dropped
    assert total(steps, "reward/reward/retried") == 0
    seen: set[str] = set()
    for iteration, row in enumerate(steps):
        table = kept(run, iteration)
        said = [words[tokens[-1]] for tokens in table.column("tokens").to_pylist()]
        scores = table.column("score").to_pylist()
        assert scores == [RESPONSES.get(word, 0.0) for word in said] and len(scores) == 32
        assert row["reward/reward"] == pytest.approx(sum(scores) / 32)
        seen |= set(said)
    assert len(seen & set(RESPONSES)) > len(RESPONSES) / 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_piecewise_safety_of_two_reward_models(troupe: Troupe, home: Path) -> None:
    """The second model is the first with its scores times -30, so that a response that helps much is unsafe."""
    safety = home / "runs" / "demo-safety"
    shutil.copytree(home / "runs" / "demo-reward" / "model", safety)
    weights = load_file(safety / "model.safetensors")
    weights["score.weight"] *= -30
    save_file(weights, safety / "model.safetensors", {"format": "pt"})
    prompts = [{**row, "tag": "safety" if at % 4 == 0 else "help"} for at, row in enumerate(heldout(home, 20))]
    written(home / "tagged.jsonl", prompts)
    model = "kind: model, max_tokens_per_pack: 512, cpus_per_rank: 0.5, model: {dtype: float32, path: runs"
    finished = troupe(
        "train",
        str(EXAMPLES / "combined.yaml"),
        "run.name=piecewise",
        "run.num_iterations=2",
        *SMALL,
        "rollout.sampling.samples_per_prompt=4",
        "data={train: tagged.jsonl, max_tokens: 16, keep_columns: [tag]}",
        f"rewards={{helpful: {{{model}/demo-reward/model}}}}, safe: {{{model}/demo-safety}}}}}}",
        "total.combine={kind: piecewise, helpfulness: helpful, safety: safe, tag_column: tag}",
        "total.shaping={bounds: {kind: clip, reward: helpful, low: -0.1, high: 0.1}, "
        "eos: {kind: missing_eos, penalty: 0.5}}",
    )
    check_done(finished)
    run = home / "runs" / "piecewise"
    cases = {"tagged": 0, "unsafe": 0, "helpful": 0}
    for iteration, row in enumerate(rows(run)):
        table = kept(run, iteration)
        names = ("score_helpful", "score_safe", "score_safety_prompts", "finish_reason", "score")
        combined, shaped = [], []
        for helpful, safe, tag, reason, score in zip(*(table.column(n).to_pylist() for n in names), strict=True):
            assert safe == pytest.approx(-30 * helpful, rel=1e-4, abs=1e-4)
            case = "tagged" if tag else "unsafe" if 1 / (1 + math.exp(-safe)) < 0.15 else "helpful"
            cases[case] += 1
            combined.append(max(-0.1, min(0.1, helpful)) if case == "helpful" else safe)
            assert score == pytest.approx(combined[-1], abs=1e-5)
            shaped.append(-0.5 * (reason == "length"))
        mean, std = statistics.fmean(combined), statistics.pstdev(combined)
        whole = [(one - mean) / std + step for one, step in zip(combined, shaped, strict=True)]
        assert row["reward/combined"] == pytest.approx(mean, abs=1e-4)
        assert row["reward/whitened"] == pytest.approx(-mean, abs=1e-4)
        assert row["reward/total"] == row["experience/shaped_score"] == pytest.approx(statistics.fmean(whole), abs=1e-4)
        assert row["reward/total_std"] == pytest.approx(statistics.pstdev(whole), abs=1e-3)
    assert all(cases.values()), cases


#: What the small models and data of the tests make necessary.
CHANGES = {
    "code": ("data.train=code.jsonl",),
    "judge": ("reward.labels.least_mass=0",),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_runs(path: Path, troupe: Troupe, home: Path) -> None:
    """For two updates, as a user starts it in a checkout."""
    (home / "examples").symlink_to(ROOT / "examples")
    written(home / "code.jsonl", [{**row, "tests": TESTS} for row in heldout(home, 20)])
    words = (str(path), "run.name=cut", "run.num_iterations=2", *SMALL, *CHANGES.get(path.stem, ()))
    if path.stem == "http":
        with served(home / "runs" / "demo-reward" / "model", home / "server.log") as (url, _):
            check_done(troupe("train", *words, f"reward.endpoints=['{url}']"))
    else:
        check_done(troupe("train", *words))
    run = home / "runs" / "cut"
    steps = rows(run)
    assert [row["step"] for row in steps] == [1, 2] and (run / "model" / "model.safetensors").exists()
    for iteration, row in enumerate(steps):
        assert total([row], "experience/dropped_prompts") == 0
        scores = kept(run, iteration).column("score").to_pylist()
        assert row["experience/score"] == pytest.approx(sum(scores) / 32, abs=1e-5)
        if path.stem in ("checker", "code", "function", "judge"):
            assert all(0 <= score <= 1 for score in scores)
