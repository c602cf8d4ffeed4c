"""Policy, critic, reference and reward model score each token as if its sequence were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers

from actors.config import ModelConfig
from actors.models import load_causal_lm, load_scorer
from experience.schema import REF_LOGPROBS, SCORES, VALUES, SchemaError, check_schema
from tests.actors import role_programs as programs
from tests.actors import tiny_models
from tests.actors.experience_batches import rollout, rows_of
from tests.actors.ranks import Ranks, context

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def alone_logprobs(folder: Path, batches: list[pa.RecordBatch]) -> list[list[float]]:
    """Response log-probs with temperature, each sequence by itself through transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for row, num_prompt in zip(rows_of(batches, "tokens"), rows_of(batches, "num_prompt_tokens"), strict=True):
        tokens = torch.tensor(row)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0] / programs.TEMPERATURE
        every = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        found.append(every[num_prompt - 1 :].tolist())
    return found


def alone_scores(folder: Path, batches: list[pa.RecordBatch]) -> list[list[float]]:
    """The head on every token of each sequence, by itself."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        rows = [torch.tensor(row) for row in rows_of(batches, "tokens")]
        return [model.score(model.model(row[None]).last_hidden_state)[0, :, 0].tolist() for row in rows]


def joined(results: list[tuple[pa.RecordBatch, object]], name: str) -> list[Any]:
    return rows_of([batch for batch, _ in results], name)


def assert_rows_close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.fixture(scope="module")
def batches() -> list[pa.RecordBatch]:
    """Two batches: 13 samples from 100 on, as two engines would give them."""
    return [rollout(8, seed=1, first_id=100), rollout(5, seed=2, first_id=108)]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_reference_logprobs_equal_each_sequence_alone(kind: str, models: Path, batches: list[pa.RecordBatch]) -> None:
    batch, info = programs.reference_scores(context(role="reference"), models / kind, "replicas", batches)
    check_schema(batch, REF_LOGPROBS)
    assert batch.column("sample_id").to_pylist() == list(range(100, 113))
    assert_rows_close(rows_of([batch], "ref_logprobs"), alone_logprobs(models / kind, batches))
    assert info.num_rows == 13 and info.num_tokens == sum(map(len, rows_of(batches, "tokens")))


@pytest.mark.parametrize("sharding", ["replicas", "zero3"])
def test_ranks_score_their_own_rows_in_order(
    sharding: str, models: Path, batches: list[pa.RecordBatch], two_ranks: Ranks
) -> None:
    results = two_ranks.run(programs.reference_scores, models / "llama", sharding, batches)
    assert joined(results, "sample_id") == list(range(100, 113))
    assert all(info.num_rows > 3 for _, info in results)
    assert_rows_close(joined(results, "ref_logprobs"), alone_logprobs(models / "llama", batches))


@pytest.mark.parametrize("stage", [1, 3])
def test_policy_scores_like_the_reference(
    stage: int, models: Path, batches: list[pa.RecordBatch], two_ranks: Ranks
) -> None:
    results = two_ranks.run(programs.policy_scores, models / "qwen2", stage, batches)
    assert_rows_close(joined(results, "policy_logprobs"), alone_logprobs(models / "qwen2", batches))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_value_sees_only_what_comes_before_its_token(
    stage: int, models: Path, batches: list[pa.RecordBatch], two_ranks: Ranks
) -> None:
    results = two_ranks.run(programs.critic_scores, models / "score", stage, batches)
    check_schema(results[0][0], VALUES)
    prompts = rows_of(batches, "num_prompt_tokens")
    every = alone_scores(models / "score", batches)
    expected = [scores[num - 1 : -1] for scores, num in zip(every, prompts, strict=True)]
    assert_rows_close(joined(results, "values"), expected)


@pytest.mark.parametrize("sharding", ["replicas", "zero3"])
def test_a_score_is_read_at_the_last_token(
    sharding: str, models: Path, batches: list[pa.RecordBatch], two_ranks: Ranks
) -> None:
    results = two_ranks.run(programs.reward_scores, models / "score", models / "qwen2", sharding, batches)
    check_schema(results[0][0], SCORES)
    assert joined(results, "sample_id") == list(range(100, 113))
    expected = [scores[-1] for scores in alone_scores(models / "score", batches)]
    assert joined(results, "score") == pytest.approx(expected, abs=1e-5)


def test_a_score_does_not_depend_on_batch_mates(models: Path, batches: list[pa.RecordBatch]) -> None:
    actor = programs.reward(context(), models / "score", models / "qwen2")
    together = rows_of([actor.score(batches)[0]], "score")
    reversed_rows = batches[1].take(pa.array([4, 3, 2, 1, 0]))
    assert rows_of([actor.score([reversed_rows])[0]], "score")[::-1] == pytest.approx(together[8:], abs=1e-5)
    single = [actor.score([batches[0].slice(row, 1)])[0].column("score")[0].as_py() for row in range(8)]
    assert single == pytest.approx(together[:8], abs=1e-5)


def test_a_score_equals_that_of_transformers_with_padding(models: Path, batches: list[pa.RecordBatch]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "score", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "score")
    rows = rows_of(batches, "tokens")
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        expected = model(padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0].tolist()
    scores = programs.reward(context(), models / "score", models / "qwen2").score(batches)[0]
    assert rows_of([scores], "score") == pytest.approx(expected, abs=1e-5)


def test_another_tokenizer_gets_the_text_again(models: Path, tmp_path: Path) -> None:
    """The reward model numbers letters the other way round; the score is that of the same text."""
    # Not qwen2: for that model type transformers 5 replaces any tokenizer's rules by Qwen's own.
    folder = tiny_models.write(tmp_path / "score", "llama", head="score")
    tiny_models.tokenizer(backwards=True).save_pretrained(folder)
    ours, theirs = tiny_models.tokenizer(), tiny_models.tokenizer(backwards=True)
    texts = ["HELLO WORLD?", "AB", "42!"]
    tokens = [[*ours(text)["input_ids"], ours.eos_token_id] for text in texts]
    tokens[2] = tokens[2][:-1]
    batch = rollout(3)
    batch = batch.set_column(2, batch.schema.field("tokens"), pa.array(tokens, batch.schema.field("tokens").type))
    batch = batch.set_column(3, batch.schema.field("num_prompt_tokens"), pa.array([1, 1, 1], pa.int32()))
    scores = programs.reward(context(), folder, models / "llama").score([batch])[0].column("score").to_pylist()
    model = load_scorer(ModelConfig(path=str(folder), dtype="float32"))
    for text, eos, score in zip(texts, (True, True, False), scores, strict=True):
        row = torch.tensor(theirs(text)["input_ids"] + [theirs.eos_token_id] * eos)
        assert model(row, torch.arange(len(row)))[-1].item() == pytest.approx(score, abs=1e-5)


def test_a_sample_that_another_tokenizer_makes_too_long_is_a_failure(models: Path, tmp_path: Path) -> None:
    """The policy has one token for it; the reward model spells it, letter by letter, into more than a pack holds."""
    folder = tiny_models.write(tmp_path / "score", "llama", head="score")
    tiny_models.tokenizer(backwards=True).save_pretrained(folder)
    policy = tiny_models.write(tmp_path / "policy", "llama")
    whole = tiny_models.tokenizer()
    whole.add_tokens(["A" * 200])
    whole.save_pretrained(policy)
    texts = ["AB", "A" * 200, "42!"]
    tokens = [whole(text)["input_ids"] for text in texts]
    assert len(tokens[1]) == 1
    batch = rollout(3)
    batch = batch.set_column(2, batch.schema.field("tokens"), pa.array(tokens, batch.schema.field("tokens").type))
    column, info = programs.reward(context(), folder, policy).score([batch])
    scores = column.column("score").to_pylist()
    model, theirs = load_scorer(ModelConfig(path=str(folder), dtype="float32")), tiny_models.tokenizer(backwards=True)
    for at in (0, 2):
        row = torch.tensor(theirs(texts[at])["input_ids"])
        assert model(row, torch.arange(len(row)))[-1].item() == pytest.approx(scores[at], abs=1e-5)
    assert scores[1] != scores[1] and info.num_retried == 0
    assert info.num_failures == info.num_failed_tries == {"too_long": 1}
    assert "200 tokens of the model" in info.failures[0].detail and info.failures[0].sample_id == 1


def test_a_score_that_is_no_number_is_a_failure(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_models.write(tmp_path / "bad", "qwen2", head="score")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[37] = float("nan")
    model.save_pretrained(folder)
    batch = rollout(12, seed=5, first_id=40)
    tokens, prompts = rows_of([batch], "tokens"), rows_of([batch], "prompt_id")
    with_37 = [40 + i for i, row in enumerate(tokens) if 37 in row]
    assert 0 < len(with_37) <= 5
    column, info = programs.reward(context(), folder, models / "qwen2").score([batch])
    scores = column.column("score").to_pylist()
    expected = [row[-1] for row in alone_scores(folder, [batch])]
    assert scores == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert [failure.sample_id for failure in info.failures] == with_37
    assert info.dropped == {prompts[sample - 40]: "reward not_finite" for sample in with_37}
    assert info.num_failures == {"not_finite": len(with_37)}
    # The pack failed as a whole, and then those that are at fault by themselves.
    assert info.num_retried >= len(with_37)
    assert info.num_failed_tries == {"not_finite": info.num_retried + len(with_37)}
    assert f"sample {with_37[0]} of prompt {prompts[with_37[0] - 40]} has no score (not_finite" in caplog.text


def test_wrong_batches_and_long_rows_are_refused(models: Path, batches: list[pa.RecordBatch]) -> None:
    actor = programs.reference(context(), models / "qwen2")
    with pytest.raises(SchemaError, match="rollout"):
        actor.score([pa.record_batch({"tokens": [[1]]})])
    with pytest.raises(ValueError, match="48"):
        actor.score([rollout(4, longest=120)])


def test_long_packs_equal_short_ones(models: Path) -> None:
    """One pack of everything against a pack for each row."""
    model = load_causal_lm(ModelConfig(path=str(models / "qwen2"), dtype="float32"))
    rows = [torch.tensor(row) for row in rows_of([rollout(10)], "tokens")]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    with torch.no_grad():
        packed = model(torch.cat(rows), positions)
        alone = torch.cat([model(row, torch.arange(len(row))) for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
