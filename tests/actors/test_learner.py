"""Pre-training, SFT and reward models: the loss is the batch's own, whatever ranks and packs."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import transformers

from actors.config import ModelConfig
from actors.models import load_scorer
from experience.schema import EXAMPLES, SchemaError, make_batch
from tests.actors import role_programs as programs
from tests.actors.experience_batches import comparisons, examples, rows_of
from tests.actors.ranks import Ranks, context

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def slow_nats(folder: Path, batch: pa.RecordBatch) -> float:
    """Mean nats a learnt token, each sequence by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for row, mask in zip(rows_of([batch], "tokens"), rows_of([batch], "loss_mask"), strict=True):
        tokens = torch.tensor(row)
        with torch.no_grad():
            logprobs = model(tokens[None]).logits[0].log_softmax(-1)
        for at in range(1, len(row)):
            if mask[at]:
                total -= logprobs[at - 1, row[at]].item()
                count += 1
    return total / count


@pytest.mark.parametrize("stage", [1, 3])
def test_next_token_loss_is_of_the_learnt_tokens(stage: int, models: Path, two_ranks: Ranks) -> None:
    batch = examples(9)
    reports, before, after = two_ranks.run(programs.learn, models / "qwen2", "sft", stage, [batch] * 4, None)[0]
    expected = slow_nats(models / "qwen2", batch)
    assert before["loss"] == pytest.approx(expected, rel=1e-5)
    assert before["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert reports[0].metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert reports[0].num_tokens == sum(map(len, rows_of([batch], "tokens")))
    assert after["loss"] < reports[2].metrics["loss"] < expected


def test_one_rank_and_two_learn_the_same(models: Path, two_ranks: Ranks, one_rank: Ranks) -> None:
    batches = [examples(9, seed) for seed in range(3)]
    one = one_rank.run(programs.learn, models / "qwen2", "pretrain", 3, batches, None)[0]
    two = two_ranks.run(programs.learn, models / "qwen2", "pretrain", 3, batches, None)[1]
    assert [r.metrics["loss"] for r in one[0]] == pytest.approx([r.metrics["loss"] for r in two[0]], rel=1e-5)
    assert one[2] == pytest.approx(two[2], rel=1e-5)


def test_a_reward_model_from_a_language_model_starts_at_ln_2(models: Path, two_ranks: Ranks, tmp_path: Path) -> None:
    batch = comparisons(6)
    reports, before, after = two_ranks.run(
        programs.learn, models / "qwen2", "reward_model", 1, [batch] * 8, tmp_path / "reward"
    )[0]
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert before["accuracy"] == 0.5
    assert reports[0].metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert after["accuracy"] == 1.0 and after["loss"] < 0.3
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert exported.config.num_labels == 1 and exported.config.pad_token_id is not None
    rows = [torch.tensor(row)[None] for row in rows_of([batch], "tokens")]
    with torch.no_grad():
        scores = [exported(row).logits.item() for row in rows]
    margins = [good - bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    assert sum(margins) / 6 == pytest.approx(after["margin"], rel=1e-4)
    again = load_scorer(ModelConfig(path=str(tmp_path / "reward"), dtype="float32"))
    with torch.no_grad():
        found = [again(row[0], torch.arange(row.shape[1]))[-1].item() for row in rows]
    assert found == pytest.approx(scores, abs=1e-5)


def test_pairwise_loss_equals_written_out(models: Path) -> None:
    batch = comparisons(5)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "score", dtype=torch.float32)
    with torch.no_grad():
        scores = [model(torch.tensor(row)[None]).logits.item() for row in rows_of([batch], "tokens")]
    losses = [math.log(1 + math.exp(b - a)) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    actor = programs.learner(context(), models / "score", "reward_model")
    assert actor.evaluate([batch])["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    halves = [batch.slice(0, 4), batch.slice(4)]
    assert actor.evaluate(halves)["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_evaluation_learns_nothing(models: Path) -> None:
    actor = programs.learner(context(), models / "qwen2", "sft")
    assert actor.evaluate([examples(5)]) == actor.evaluate([examples(5)])


def test_batches_with_nothing_to_learn_are_refused(models: Path) -> None:
    actor = programs.learner(context(), models / "qwen2", "sft")
    unmasked = make_batch(EXAMPLES, {"example_id": [0], "tokens": [[5, 6]], "loss_mask": [[1, 0]]})
    with pytest.raises(SchemaError, match="none of the 1 rows"):
        actor.train(0, 1, unmasked)
    with pytest.raises(SchemaError, match="expected a batch of schema examples"):
        actor.train(0, 1, comparisons(2))
    with pytest.raises(ValueError, match="max_tokens"):
        actor.train(0, 1, make_batch(EXAMPLES, {"example_id": [0], "tokens": [[5] * 50], "loss_mask": [[1] * 50]}))


def test_comparisons_must_stand_in_pairs(models: Path) -> None:
    actor = programs.learner(context(), models / "score", "reward_model")
    for wrong in (comparisons(2).slice(0, 3), comparisons(3).slice(1, 4), comparisons(2).take(pa.array([1, 0]))):
        with pytest.raises(SchemaError, match="two or more rows that stand together"):
            actor.train(0, 1, wrong)
