"""PPO-ptx: an update's gradient is that of the summed objective, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers

from actors.pretraining import PretrainingMix
from experience.packing import minibatches
from experience.schema import SchemaError
from tests.actors import role_programs as programs
from tests.actors.experience_batches import credit, examples, rollout, rows_of
from tests.actors.ranks import Ranks, context

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

COEFFICIENT = 3.0
ALGORITHM: dict[str, Any] = {"num_minibatches": 2, "pretraining": {"coefficient": COEFFICIENT}}
ROLLOUTS = [rollout(6, seed=1)]
TEXT = [examples(5, seed=3), examples(6, seed=4)]
CREDITS = credit(ROLLOUTS, [[-4.0] * len(row) for row in rows_of(ROLLOUTS, "rollout_logprobs")])


def summed_objective(folder: Path) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of both updates, by autograd of the sum: 11 rows of text are cut into 5 and 6."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    tokens, prompts = rows_of(ROLLOUTS, "tokens"), rows_of(ROLLOUTS, "num_prompt_tokens")
    texts, masks = rows_of(TEXT, "tokens"), rows_of(TEXT, "loss_mask")
    losses, norms = [], []
    for rows, text in zip(minibatches(6, 2, 3, 0, 0), (range(5), range(5, 11)), strict=True):
        policy, num_policy = torch.zeros(()), sum(len(tokens[row]) - prompts[row] for row in rows)
        for row in rows:
            logits = model(torch.tensor(tokens[row])[None]).logits[0] / programs.TEMPERATURE
            for at in range(prompts[row], len(tokens[row])):
                logprob = logits[at - 1].log_softmax(-1)[tokens[row][at]]
                advantage = CREDITS.column("advantages")[row][at - prompts[row]].as_py()
                ratio = (logprob + 4.0).exp()
                policy = policy - torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
        nats, num_text = torch.zeros(()), sum(sum(masks[row][1:]) for row in text)
        for row in text:
            logits = model(torch.tensor(texts[row])[None]).logits[0]
            for at in range(1, len(texts[row])):
                if masks[row][at]:
                    nats = nats - logits[at - 1].log_softmax(-1)[texts[row][at]]
        total = policy / num_policy + COEFFICIENT * nats / num_text
        optimizer.zero_grad()
        torch.autograd.backward(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(total.item())
    return losses, norms


@pytest.mark.parametrize(("num_ranks", "stage"), [(1, 1), (2, 2), (2, 3)])
def test_equals_autograd_of_the_sum(
    num_ranks: int, stage: int, models: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    losses, norms = summed_objective(models / "qwen2")
    ranks = one_rank if num_ranks == 1 else two_ranks
    reports = ranks.run(programs.train_with_text, models / "qwen2", stage, ROLLOUTS, CREDITS, TEXT, ALGORITHM)
    for report in reports:
        assert report.metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert report.metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
        nats = report.metrics["pretraining_nats_per_token"]
        assert report.metrics["policy_loss"] + COEFFICIENT * nats == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_every_update_has_text() -> None:
    mix = PretrainingMix(TEXT[:1], 6, 1.0, context(), torch.device("cpu"), 48)
    with pytest.raises(SchemaError):
        mix.packs(0)  # five rows for six updates
    batches: list[pa.RecordBatch] = [batch.slice(0, 3) for batch in TEXT]
    cuts = [PretrainingMix(batches, 3, 1.0, context(), torch.device("cpu"), 48).packs(update) for update in range(3)]
    assert [sum(len(pack.tokens.targets_S) for pack in packs) for packs in cuts] == [
        packs[0].denominator for packs in cuts
    ]
