"""KTO: the loss is that of responses scored alone, felt from the KL estimate of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from actors.config import ModelConfig
from actors.errors import RoleError
from actors.feedback import Feedback
from actors.models import load_causal_lm
from actors.sequences import ReferenceLogprobs
from algorithms.config import FeedbackConfig
from experience.schema import (
    FEEDBACK,
    REF_FEEDBACK_LOGPROBS,
    SchemaError,
    check_schema,
    make_batch,
)
from experience.table import write_table
from tests.actors import comparison_programs as programs
from tests.actors.ranks import Ranks, context

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CPU = torch.device("cpu")
CONFIG = FeedbackConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7, batch_size=8)
LABELS = [True, False, False, True, False, True, False]
#: A row has the mismatched response of the row so many behind it.
SHIFT = 3


def judged(labels: Sequence[bool] = LABELS, seed: int = 3) -> pa.RecordBatch:
    """Rows of feedback. Responses are of 1 to 8 tokens, and mismatched ones too."""
    rows = programs.ranked([[0, 1]] * len(labels), seed=seed)
    tokens, prompts = rows.column("tokens").to_pylist()[::2], rows.column("num_prompt_tokens").to_pylist()[::2]
    number = len(tokens)
    others = [(row + SHIFT) % number for row in range(number)]
    pairs = zip(tokens, prompts, others, strict=True)
    columns = {
        "sequence_id": list(range(number)),
        "tokens": tokens,
        "num_prompt_tokens": prompts,
        "desirable": list(labels),
        "mismatched_tokens": [row[:prompt] + tokens[other][prompts[other] :] for row, prompt, other in pairs],
    }
    return make_batch(FEEDBACK, columns)


def mismatched(rows: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows, with the mismatched responses in the place of the judged ones."""
    columns = {name: rows.column(name) for name in rows.schema.names}
    return make_batch(FEEDBACK, columns | {"tokens": rows.column("mismatched_tokens")})


def written(ref: Sequence[float], other: Sequence[float], path: Path) -> Path:
    columns = {"sequence_id": list(range(len(ref))), "ref_logprob": ref, "mismatched_ref_logprob": other}
    write_table(pa.Table.from_batches([make_batch(REF_FEEDBACK_LOGPROBS, columns)]), path)
    return path


def by_hand(policy: Sequence[float], ref: Sequence[float], labels: Sequence[bool], baseline: float) -> float:
    """The loss in a loop over responses."""
    losses = []
    for logprob, ref_logprob, desirable in zip(policy, ref, labels, strict=True):
        gain = CONFIG.beta * (logprob - ref_logprob - max(0.0, baseline))
        weight, gain = (CONFIG.desirable_weight, gain) if desirable else (CONFIG.undesirable_weight, -gain)
        losses.append(weight * (1 - 1 / (1 + math.exp(-gain))))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def qwen(models: Path) -> Path:
    return models / "qwen2"


@pytest.fixture(scope="module")
def alone(qwen: Path) -> tuple[list[float], list[float]]:
    """Log-probs of judged and of mismatched responses, each forwarded by itself."""
    return programs.plain_logprobs(qwen, judged()), programs.plain_logprobs(qwen, mismatched(judged()))


@pytest.fixture(scope="module")
def other(
    alone: tuple[list[float], list[float]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[float], Path]:
    """Log-probs of a reference that is another model, and the file of them. The baseline is above 0."""
    source = torch.Generator().manual_seed(1)
    ref, mates = ([v + torch.randn(1, generator=source).item() for v in values] for values in alone)
    mates = [value - 1.0 for value in mates]
    return ref, mates, written(ref, mates, tmp_path_factory.mktemp("other") / "reference.arrow")


@pytest.mark.parametrize("sign", [1, -1])
def test_loss_is_that_of_responses_scored_alone(
    sign: int, qwen: Path, alone: tuple[list[float], list[float]], other: tuple[list[float], list[float], Path],
    tmp_path: Path,
) -> None:
    """With a baseline above 0, and with one that is cut off there."""
    ref, path = other[0], other[2]
    mates = [value + (2.0 if sign < 0 else 0.0) for value in other[1]]
    if sign < 0:
        path = written(ref, mates, tmp_path / "reference.arrow")
    baseline = sum(p - r for p, r in zip(alone[1], mates, strict=True)) / len(mates)
    assert baseline * sign > 0.1
    expected = by_hand(alone[0], ref, LABELS, baseline)
    actor = programs.learner(context(), qwen, CONFIG, rate=1e-4)
    with pytest.raises(RoleError, match="kto compares with a reference, whose log-probs were not given"):
        actor.evaluate([judged()])
    actor.use_reference(path)
    found = actor.evaluate([judged()])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["kl_baseline"] == pytest.approx(max(0.0, baseline), rel=1e-4, abs=1e-5)
    # The held-out set is one, however it comes.
    assert actor.evaluate([judged().slice(0, 2), judged().slice(2)]) == pytest.approx(found, rel=1e-5)
    rewards = [CONFIG.beta * (p - r) for p, r in zip(alone[0], ref, strict=True)]
    good = [reward for reward, label in zip(rewards, LABELS, strict=True) if label]
    assert found["chosen_reward"] == pytest.approx(sum(good) / len(good), rel=1e-4)
    assert actor.train(0, 1, judged()).metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert actor.evaluate([judged()])["loss"] < found["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True])
def test_at_first_rewards_are_0(dtype: str, lora: bool, qwen: Path, tmp_path: Path) -> None:
    actor = programs.learner(context(), qwen, CONFIG, lora=lora, dtype=dtype)
    column, info = actor.score_reference(judged())
    assert info.num_rows == len(LABELS)
    check_schema(column, REF_FEEDBACK_LOGPROBS)
    write_table(pa.Table.from_batches([column]), tmp_path / "reference.arrow")
    actor.use_reference(tmp_path / "reference.arrow")
    near = 1e-6 if dtype == "float32" else 2e-2
    half = (CONFIG.desirable_weight * sum(LABELS) + CONFIG.undesirable_weight * (7 - sum(LABELS))) / 7 / 2
    for found in (actor.evaluate([judged()]), actor.train(0, 1, judged()).metrics):
        assert found["loss"] == pytest.approx(half, abs=near)
        for name in ("chosen_reward", "rejected_reward", "kl_baseline"):
            assert found[name] == pytest.approx(0, abs=4 * near)
    moved = actor.evaluate([judged()])
    assert moved["chosen_reward"] > moved["rejected_reward"]


def test_the_baseline_does_not_depend_on_ranks_or_packs(
    qwen: Path, two_ranks: Ranks, one_rank: Ranks, other: tuple[list[float], list[float], Path]
) -> None:
    """Batches of one response among the others: then a rank has none, and one kind is missing."""
    batches = [judged(), judged().slice(3, 1), judged()]
    (before, reports, after) = one_rank.run(programs.learn, qwen, CONFIG, 1, batches, other[2])[0]
    first, second = two_ranks.run(programs.learn, qwen, CONFIG, 3, batches, other[2])
    assert first == second
    assert first[0] == pytest.approx(before, rel=1e-4, abs=1e-5)
    assert "rejected_reward" not in reports[1] and "chosen_reward" in reports[1]
    for report, alone_report in zip(first[1], reports, strict=True):
        assert report == pytest.approx(alone_report, rel=1e-3, abs=1e-4)
    assert first[2] == pytest.approx(after, rel=1e-3, abs=1e-3)
    assert before["kl_baseline"] > 0.1
    small = programs.learner(context(), qwen, CONFIG, max_tokens=12)
    small.use_reference(other[2])
    assert small.evaluate([judged()]) == pytest.approx(before, rel=1e-4, abs=1e-5)


def test_ranks_score_the_reference_in_order(
    qwen: Path, two_ranks: Ranks, alone: tuple[list[float], list[float]]
) -> None:
    """The whole, and one row, of which one rank has none; with sharded weights, where both go through all packs."""
    batches = [judged(), judged().slice(2, 1)]
    results = two_ranks.run(programs.score, qwen, CONFIG, 3, batches)
    whole = pa.Table.from_batches([columns[0] for columns in results])
    assert whole.column("sequence_id").to_pylist() == list(range(len(LABELS)))
    for name, expected in zip(("ref_logprob", "mismatched_ref_logprob"), alone, strict=True):
        assert whole.column(name).to_pylist() == pytest.approx(expected, rel=1e-5)
    assert min(len(columns[0]) for columns in results) > 0
    assert sum(len(columns[1]) for columns in results) == 1


def test_an_empty_pack_adds_nothing(qwen: Path, other: tuple[list[float], list[float], Path]) -> None:
    model = load_causal_lm(ModelConfig(path=str(qwen), dtype="float32"))
    objective = Feedback(CONFIG)
    objective.use_reference(ReferenceLogprobs(other[2], REF_FEEDBACK_LOGPROBS))
    loss, metrics = objective.loss(model, objective.batch([judged()]).pack([], CPU), 3)
    assert loss.item() == 0 and all(float(value) == 0 for value in metrics.values())
    loss.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.abs().max() > 0


def test_what_does_not_belong_is_refused(qwen: Path, tmp_path: Path) -> None:
    actor = programs.learner(context(), qwen, CONFIG)
    pairs = programs.ranked([[0, 1]] * 2)
    with pytest.raises(SchemaError, match="feedback"):
        actor.evaluate([pairs])
    with pytest.raises(SchemaError, match="feedback"):
        actor.score_reference(pairs)
    with pytest.raises(SchemaError, match="ref_feedback_logprobs"):
        actor.use_reference(programs.write_reference([0.0], tmp_path / "reference.arrow"))
    with pytest.raises(SchemaError, match="the batch is empty"):
        actor.evaluate([judged().slice(0, 0)])
