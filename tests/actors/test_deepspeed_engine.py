"""The training engine: sharding and cutting into micro-batches change nothing but rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from actors.models import load_causal_lm
from tests.actors import engine_programs as programs
from tests.actors.ranks import Ranks

NUM_STEPS = 4
"""Steps of a training in these tests."""


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
        total.backward()
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
            torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert results[0][0] == results[1][0]
