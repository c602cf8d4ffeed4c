"""``troupe check`` finds what would stop a run, all of it, before the run starts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
Troupe = Callable[..., subprocess.CompletedProcess[str]]


def test_the_default_run_can_run(troupe: Troupe) -> None:
    done = troupe("check", "ray_config.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("LlamaForCausalLM", "LlamaForSequenceClassification", "200 rows read", "rollout", "can run"):
        assert told in done.stdout


def test_everything_that_is_wrong_is_told_at_once(troupe: Troupe, home: Path) -> None:
    runs = home / "runs"
    broken = runs / "broken"
    shutil.copytree(runs / "demo-sft" / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    two = runs / "two-labels"
    shutil.copytree(runs / "demo-reward" / "model", two)
    config = json.loads((two / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (two / "config.json").write_text(json.dumps(config))
    bad = runs / "bad.jsonl"
    bad.write_text('{"prompt": "list 1 2 sorted :"}\n{"prompt": "list 1\n')
    done = troupe(
        "check",
        "ray_config.yaml",
        "policy.model.path=runs/demo/nowhere",
        "reference.model.path=runs/broken",
        "reward.model.path=runs/two-labels",
        "data.train=runs/bad.jsonl",
        "rollout.max_model_tokens=null",
        "rollout.sampling.max_response_tokens=100",
        "critic.cpus_per_rank=1000000",
        "cluster.accelerator_resource=gpu_slot",
        "reward.gpus_per_rank=1",
    )
    assert done.returncode == 2
    told = " ".join(done.stdout.split())
    for problem in (
        "policy.model.path: no model can be read from",
        "model.safetensors is damaged",
        "the model has 2 labels; a model with one label",
        "sequences of 116 tokens are longer than the model's context of 64",
        "reward bundle 0 of 1 needs 0.5 CPU, 1 gpu_slot",
        "cannot run",
    ):
        assert problem in told, f"{problem!r} is not in {told}"


def test_data_of_no_known_format_are_named(troupe: Troupe, home: Path) -> None:
    (home / "runs" / "bad.jsonl").write_text('{"question_text": "list 1 2 sorted :"}\n')
    done = troupe("check", "ray_config.yaml", "data.train=runs/bad.jsonl")
    assert done.returncode == 2
    assert "question_text" in done.stdout


def test_a_mistake_in_the_configuration_ends_with_2(troupe: Troupe) -> None:
    done = troupe("check", str(ROOT / "examples" / "sft.yaml"), "learner.optimizer.learning_rat=1")
    assert done.returncode == 2
    assert "learning_rate" in done.stderr
