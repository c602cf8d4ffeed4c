"""A whole run of PPO: its policy tuned by LoRA, its critic by QLoRA, its engines running the policy's adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, Troupe

NUM_ITERATIONS = 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ppo_by_lora(troupe: Troupe, home: Path) -> None:
    """The engines follow the policy from one adapter to the next, at a fraction of the bytes of its weights."""
    finished = troupe(
        "train",
        str(ROOT / "examples" / "ppo.yaml"),
        "run.name=ppo-lora",
        f"run.num_iterations={NUM_ITERATIONS}",
        "online.batch_size=32",
        "online.scoring_batch_size=16",
        "algorithm.critic_warmup_iterations=0",
        "policy.tuning={method: lora, lora: {rank: 4}}",
        "policy.optimizer.learning_rate=0.01",
        "critic.tuning={method: qlora, lora: {rank: 4}}",
        "rollout.lora=adapter",
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    run = home / "runs" / "ppo-lora"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == NUM_ITERATIONS
    for row in rows:
        # On its first minibatch the policy is the one that sampled: in float32, to rounding.
        assert row["policy/first_ratio_max_deviation"] < 1e-3
        assert row["policy/first_logprob_gap"] < 1e-4
    assert rows[0]["experience/kl_per_token"] < 1e-6 < 1e-3 < rows[1]["experience/kl_per_token"], "it had learnt"
    weights = (run / "model" / "model.safetensors").stat().st_size
    assert rows[-1]["publish/weights_bytes"] < weights / 2
