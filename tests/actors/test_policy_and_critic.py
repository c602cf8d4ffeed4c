"""PPO updates: invariant to ranks and packs, equal to a slow loop, and no step without sense."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
import transformers

from actors.errors import TrainingDiverged
from algorithms.config import OnlineConfig
from experience.packing import minibatches
from experience.schema import SchemaError
from tests.actors import role_programs as programs
from tests.actors.experience_batches import credit, rollout, rows_of, values
from tests.actors.ranks import Ranks, context

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

ALGORITHM = {"num_epochs": 2, "num_minibatches": 2, "entropy_coefficient": 0.01}


@pytest.fixture(scope="module")
def batches() -> list[pa.RecordBatch]:
    return [rollout(8, seed=1, first_id=100), rollout(5, seed=2, first_id=108)]


@pytest.fixture(scope="module")
def on_policy(models: Path, batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Credit whose behaviour log-probs are the policy's own."""
    logprobs = programs.policy(context(), models / "qwen2").score(batches)[0].column("policy_logprobs").to_pylist()
    return credit(batches, logprobs)


def slow_training(
    folder: Path, batches: list[pa.RecordBatch], labels: pa.RecordBatch, num_iterations: int
) -> tuple[list[float], list[float]]:
    """Mean loss and gradient norm of each iteration: PPO written out, sample by sample, token by token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    tokens, prompts = rows_of(batches, "tokens"), rows_of(batches, "num_prompt_tokens")
    losses, norms = [], []
    for iteration in range(num_iterations):
        own_losses, own_norms = [], []
        for epoch in range(2):
            for rows in minibatches(len(tokens), 2, 3, iteration, epoch):
                num_tokens = sum(len(tokens[row]) - prompts[row] for row in rows)
                total = torch.zeros(())
                for row in rows:
                    logits = model(torch.tensor(tokens[row])[None]).logits[0] / programs.TEMPERATURE
                    for at in range(prompts[row], len(tokens[row])):
                        every = logits[at - 1].log_softmax(-1)
                        old = labels.column("behaviour_logprobs")[row][at - prompts[row]].as_py()
                        advantage = labels.column("advantages")[row][at - prompts[row]].as_py()
                        ratio = (every[tokens[row][at]] - old).exp()
                        gain = torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
                        total = total - (gain - 0.01 * (every.exp() * every).sum()) / num_tokens
                optimizer.zero_grad()
                torch.autograd.backward(total)
                own_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
                optimizer.step()
                own_losses.append(total.item())
        losses.append(sum(own_losses) / 4)
        norms.append(sum(own_norms) / 4)
    return losses, norms


@pytest.mark.parametrize("stage", [1, 3])
def test_policy_equals_a_slow_loop_on_any_ranks(
    stage: int, models: Path, batches: list[pa.RecordBatch], on_policy: pa.RecordBatch, two_ranks: Ranks
) -> None:
    losses, norms = slow_training(models / "qwen2", batches, on_policy, 2)
    results = two_ranks.run(programs.train_policy, models / "qwen2", stage, batches, on_policy, ALGORITHM)
    assert [r.metrics for r in results[0][0]] == [
        pytest.approx(r.metrics | {"tokens_per_second": pytest.approx(1, rel=1e6)}) for r in results[1][0]
    ]
    for reports, _ in results:
        assert [r.metrics["loss"] for r in reports] == pytest.approx(losses, abs=2e-5)
        assert [r.metrics["grad_norm"] for r in reports] == pytest.approx(norms, rel=1e-3)
        assert [r.num_tokens for r in reports] == [2 * sum(map(len, rows_of(batches, "tokens")))] * 2


def test_the_ratio_starts_at_one(models: Path, batches: list[pa.RecordBatch], on_policy: pa.RecordBatch) -> None:
    actor = programs.policy(context(), models / "qwen2", num_epochs=2, num_minibatches=3)
    first = actor.train(0, batches, [on_policy]).metrics
    assert 0 <= first["first_ratio_max_deviation"] < 1e-4
    assert first["first_logprob_gap"] < 1e-5
    again = actor.train(1, batches, [on_policy]).metrics  # not the policy that drew them any more
    assert again["first_ratio_max_deviation"] > 1e-3
    wanted = {"clip_fraction", "approx_kl", "entropy", "grad_norm", "learning_rate", "tokens_per_second", "loss"}
    assert wanted <= first.keys()
    assert first["entropy"] > 0.1 and 0 <= first["clip_fraction"] < 1


def test_a_single_update_leaves_the_ratio_alone(
    models: Path, batches: list[pa.RecordBatch], on_policy: pa.RecordBatch
) -> None:
    metrics = programs.policy(context(), models / "qwen2").train(0, batches, [on_policy]).metrics
    assert metrics["clip_fraction"] == 0
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)


def test_good_tokens_become_likelier(models: Path, batches: list[pa.RecordBatch], two_ranks: Ranks) -> None:
    before = two_ranks.run(programs.policy_scores, models / "llama", 2, batches)
    logprobs = rows_of([batch for batch, _ in before], "policy_logprobs")
    labels = credit(batches, logprobs)
    results = two_ranks.run(programs.train_policy, models / "llama", 2, batches, labels, {"num_epochs": 3})
    after = [row for _, rows in results for row in rows]
    change = [a - b for one, other in zip(after, logprobs, strict=True) for a, b in zip(one, other, strict=True)]
    advantages = [a for row in rows_of([labels], "advantages") for a in row]
    assert torch.corrcoef(torch.tensor([change, advantages]))[0, 1] > 0.3


def test_weights_leave_under_their_names_bucket_by_bucket(models: Path, two_ranks: Ranks) -> None:
    """The first rank yields them, with any sharding; they are those of the model folder, tied ones once."""
    expected = dict(transformers.AutoModelForCausalLM.from_pretrained(models / "qwen2").named_parameters())
    for stage in (1, 3):
        sent, nothing = two_ranks.run(programs.sent_weights, models / "qwen2", stage)
        assert nothing == {}
        assert sent.keys() == expected.keys() and "lm_head.weight" not in sent
        assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_critic_learns_the_returns(
    stage: int, models: Path, batches: list[pa.RecordBatch], on_policy: pa.RecordBatch, two_ranks: Ranks
) -> None:
    scored = two_ranks.run(programs.critic_scores, models / "score", stage, batches)
    old = values(batches, rows_of([batch for batch, _ in scored], "values"))
    reports = two_ranks.run(programs.train_critic, models / "score", stage, batches, old, on_policy, 4)[1]
    losses = [report.metrics["value_loss"] for report in reports]
    assert losses[-1] < 0.8 * losses[0]


def test_credit_of_other_rows_is_refused(
    models: Path, batches: list[pa.RecordBatch], on_policy: pa.RecordBatch
) -> None:
    actor = programs.policy(context(), models / "qwen2")
    with pytest.raises(SchemaError, match="row 0 is sample 100, expected sample 108"):
        actor.train(0, batches[::-1], [on_policy])
    with pytest.raises(SchemaError, match="13 rows where 8"):
        actor.train(0, batches[:1], [on_policy])


def test_a_nan_advantage_is_refused_by_place(models: Path, batches: list[pa.RecordBatch]) -> None:
    labels = credit(batches, [[-1.0] * len(row) for row in rows_of(batches, "rollout_logprobs")])
    bad = labels.set_column(
        1,
        labels.schema.field("advantages"),
        pa.array([[float("nan")] * len(row) for row in rows_of([labels], "advantages")], labels.schema.types[1]),
    )
    with pytest.raises(TrainingDiverged, match=r"policy: the loss is nan .iteration 2, epoch 0, minibatch 0."):
        programs.policy(context(), models / "qwen2").train(2, batches, [bad])


def test_the_rate_follows_the_run(models: Path, batches: list[pa.RecordBatch], on_policy: pa.RecordBatch) -> None:
    rates = programs.rates(context(), models / "qwen2", batches, on_policy)
    assert rates == pytest.approx([1e-3, 1e-3 * (1 - 0.9 / 2), 1e-4])
    assert OnlineConfig().num_epochs == 1
