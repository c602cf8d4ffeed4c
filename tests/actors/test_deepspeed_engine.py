"""The training engine: sharding and cutting into micro-batches change nothing but rounding."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from actors.models import load_causal_lm
from tests.actors import engine_programs as programs
from tests.actors.ranks import Ranks

NUM_STEPS = 4


def reference(folder: Path, weight_decay: float = 0.0) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and last weights of a plain PyTorch loop, whole batch at once, sequence by sequence."""
    model = load_causal_lm(programs.config(folder, 0).model)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        rows = programs.batch(step)
        num_tokens = sum(len(row) - 1 for row in rows)
        total = torch.zeros(())
        for row in rows:
            tokens = torch.tensor(row)
            logits = model.network(input_ids=tokens[None], use_cache=False).logits[0]
            total = total + nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum") / num_tokens
        optimizer.zero_grad()
        torch.autograd.backward(total)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        losses.append(total.item())
    return losses, norms, {name.removeprefix("network."): p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_process(stage: int, kind: str, models: Path, two_ranks: Ranks) -> None:
    losses, norms, weights = reference(models / kind)
    results = two_ranks.run(programs.train, models / kind, stage, 2, NUM_STEPS, {})
    for reports, sharded in results:
        assert [report["loss"] for report in reports] == pytest.approx(losses, rel=2e-6)
        assert [report["grad_norm"] for report in reports] == pytest.approx(norms, rel=1e-5)
        assert sharded.keys() == weights.keys()
        for name, tensor in weights.items():
            # Keys' biases have gradients of zero but for rounding, which Adam makes steps of up to 1e-5 of.
            torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))
    assert results[0][0] == results[1][0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_cutting_into_packs_changes_nothing(stage: int, models: Path, two_ranks: Ranks) -> None:
    """One row a pack, and so an empty pack on one rank, against all of a rank's rows in one."""
    whole = two_ranks.run(programs.train, models / "qwen2", stage, 4, 2, {})[0]
    small = two_ranks.run(programs.train, models / "qwen2", stage, 1, 2, {})[0]
    uneven = two_ranks.run(programs.train, models / "qwen2", stage, 3, 2, {})[0]
    for reports, weights in (small, uneven):
        assert reports == [pytest.approx(report, rel=2e-5) for report in whole[0]]
        for name, tensor in whole[1].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_metrics_are_summed_and_maxed_over_ranks(models: Path, two_ranks: Ranks) -> None:
    reports, _ = two_ranks.run(programs.train, models / "qwen2", 1, 1, 1, {})[1]
    rows = programs.batch(0)
    assert reports[0]["tokens"] == sum(len(row) - 1 for row in rows)
    assert reports[0]["longest_max"] == max(len(row) for row in rows) - 1
    assert reports[0]["learning_rate"] == 1e-2


@pytest.mark.parametrize("stage", [1, 3])
def test_weight_decay_spares_gains_and_biases(stage: int, models: Path, two_ranks: Ranks) -> None:
    _, _, weights = reference(models / "qwen2", weight_decay=0.5)
    changes = {"optimizer": {"weight_decay": 0.5}}
    _, sharded = two_ranks.run(programs.train, models / "qwen2", stage, 2, NUM_STEPS, changes)[0]
    for name, tensor in weights.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {"gradient_checkpointing": True}),
        (3, {"gradient_checkpointing": True}),
        (2, {"zero": {"offload_optimizer": True}}),
        (3, {"zero": {"offload_optimizer": True, "offload_params": True}}),
    ],
)
def test_saving_memory_changes_no_result(
    stage: int, changes: dict[str, object], models: Path, two_ranks: Ranks
) -> None:
    plain, weights = two_ranks.run(programs.train, models / "qwen2", stage, 2, 2, {})[0]
    saving, others = two_ranks.run(programs.train, models / "qwen2", stage, 2, 2, changes)[0]
    assert saving == [pytest.approx(report, rel=1e-5) for report in plain]
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_learns(stage: int, models: Path, two_ranks: Ranks) -> None:
    exact, _ = two_ranks.run(programs.train, models / "qwen2", stage, 4, NUM_STEPS, {})[0]
    reports, weights = two_ranks.run(programs.train, models / "qwen2", stage, 1, NUM_STEPS, {"dtype": "bfloat16"})[0]
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert [r["loss"] for r in reports] == pytest.approx([r["loss"] for r in exact], rel=0.02)
    assert reports[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.02)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (1, {"dtype": "bfloat16"}), (2, {"zero": {"offload_optimizer": True}})],
)
def test_resuming_is_exact(
    stage: int, changes: dict[str, object], models: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    assert two_ranks.run(programs.train_twice, models / "llama", stage, tmp_path / "checkpoint", changes) == [True] * 2


def test_resuming_with_other_ranks_is_refused(
    models: Path, two_ranks: Ranks, one_rank: Ranks, tmp_path: Path
) -> None:
    two_ranks.run(programs.save, models / "qwen2", 1, tmp_path)
    with pytest.raises(AssertionError, match="is of 2 ranks, this run has 1"):
        one_rank.run(programs.load, models / "qwen2", 1, tmp_path)
    with pytest.raises(AssertionError, match="no checkpoint of rank 0"):
        one_rank.run(programs.load, models / "qwen2", 1, tmp_path / "nowhere")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (1, "bfloat16"), (3, "bfloat16")],
)
def test_an_update_that_is_not_finite_is_refused(
    stage: int, dtype: str, bad: str, models: Path, two_ranks: Ranks
) -> None:
    for first, second, unchanged in two_ranks.run(programs.diverge, models / "qwen2", stage, dtype, bad):
        assert "policy" in first and "iteration 5, minibatch 2" in first and bad in first
        assert "refused" in second
        assert unchanged


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("stage", [1, 3])
def test_exports_load_with_transformers(
    stage: int, kind: str, models: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    two_ranks.run(programs.export, models / kind, stage, tmp_path / "export")
    _, weights = two_ranks.run(programs.train, models / kind, stage, 4, 2, {"constant_rate": True})[0]
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    names = dict(exported.named_parameters())
    assert names.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(names[name].detach(), tensor, rtol=0, atol=0)
    own = transformers.AutoModelForCausalLM.from_pretrained(models / kind)
    own.save_pretrained(tmp_path / "own")
    files = [tmp_path / name / "model.safetensors" for name in ("export", "own")]
    assert load_file(files[0]).keys() == load_file(files[1]).keys()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer("AB")["input_ids"] == [35, 36] and tokenizer.eos_token == "<eos>"


def test_sharded_weights_are_gathered_bucket_by_bucket(models: Path, two_ranks: Ranks) -> None:
    num_weights = sum(p.numel() for p in load_causal_lm(programs.config(models / "qwen2", 0).model).parameters())
    buckets = two_ranks.run(programs.bucket_sizes, models / "qwen2", 3, 20_000)[0]
    assert len(buckets) > 3
    assert sum(size for _, size, _ in buckets) == 4 * num_weights
    assert all(size <= 20_000 or number == 1 for number, size, _ in buckets)
    persistent = max(held for _, _, held in buckets) - 5_000
    assert persistent < num_weights / 2, "a rank holds much more than the bucket"


def test_sharded_forward_equals_replicas(models: Path, two_ranks: Ranks) -> None:
    replicas = two_ranks.run(programs.forward_logits, models / "llama", "replicas")
    sharded = two_ranks.run(programs.forward_logits, models / "llama", "zero3")
    for (one, _), (other, _) in zip(replicas, sharded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_roles_and_replicas_load_no_deepspeed(models: Path) -> None:
    """The driver imports role classes, and a replica must start fast."""
    program = (
        "import sys, actors.policy, actors.critic, actors.reference, actors.reward, actors.learner\n"
        "from pathlib import Path\n"
        "from tests.actors.engine_programs import forward_logits\n"
        "from tests.actors.ranks import context\n"
        f"assert forward_logits(context(), Path({str(models / 'qwen2')!r}), 'replicas')[1] is False\n"
        "assert 'deepspeed' not in sys.modules and not any(m.startswith('vllm') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
