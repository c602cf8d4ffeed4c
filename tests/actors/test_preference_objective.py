"""DPO and its kin: the loss is that of responses scored alone, against the model that training started from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from actors.config import ModelConfig
from actors.errors import RoleError
from actors.models import load_causal_lm
from actors.preference import PairBatch, Preference
from actors.sequences import ReferenceLogprobs
from algorithms.config import (
    NEEDS_REFERENCE,
    LearningConfig,
    PreferenceConfig,
    PreferenceLoss,
    RewardModelConfig,
    SupervisedConfig,
)
from experience.schema import SCORES, SchemaError, make_batch
from experience.table import write_table
from tests.actors import comparison_programs as programs
from tests.actors.ranks import Ranks, context
from tests.algorithms import slow_preferences as slow

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NAMES = get_args(PreferenceLoss)
CPU = torch.device("cpu")
NUM_PAIRS = 7
#: A larger one oversteps where a loss has a minimum; a smaller one bfloat16 does not see.
SMALL_STEP = 1e-4
#: Each loss in loops over single pairs, with the constants there.
SLOW: dict[str, Callable[[slow.Pair], Tensor]] = {
    "dpo": slow.dpo,
    "conservative_dpo": slow.conservative,
    "robust_dpo": slow.robust,
    "reference_free_dpo": slow.reference_free,
    "ipo": slow.ipo,
    "hinge": slow.hinge,
    "slic": slow.slic,
    "simpo": slow.simpo,
    "orpo": slow.orpo,
}
#: What each loss against a reference is where policy and reference are equal.
AT_FIRST = {
    "dpo": math.log(2),
    "conservative_dpo": math.log(2),
    "robust_dpo": math.log(2),
    "ipo": 1 / (2 * slow.BETA) ** 2,
    "hinge": 1.0,
}
KEYS: dict[str, dict[str, float]] = {
    "conservative_dpo": {"label_smoothing": slow.SMOOTHING},
    "robust_dpo": {"label_smoothing": slow.SMOOTHING},
    "simpo": {"target_margin": slow.GAMMA},
    "slic": {"target_margin": slow.MARGIN},
    "orpo": {"odds_coefficient": slow.COEFFICIENT},
}


def config(name: str, **changes: Any) -> PreferenceConfig:
    beta = {} if name in ("slic", "orpo") else {"beta": slow.BETA}
    arguments: dict[str, Any] = beta | KEYS.get(name, {}) | changes
    return PreferenceConfig(name=name, batch_size=8, **arguments)


def pairs(num_pairs: int = NUM_PAIRS, seed: int = 3) -> pa.RecordBatch:
    return programs.ranked([[0, 1]] * num_pairs, seed=seed)


def loss_and_nll(name: str, rows: pa.RecordBatch, policy: list[float], ref: list[float]) -> tuple[float, float]:
    """Means over pairs, of log-probs of each response."""
    tokens, prompts = rows.column("tokens").to_pylist(), rows.column("num_prompt_tokens").to_pylist()
    lengths = [len(row) - prompt for row, prompt in zip(tokens, prompts, strict=True)]
    losses, nats = [], []
    for w in range(0, len(lengths), 2):
        chosen, rejected = (torch.tensor(policy[at], dtype=torch.float64) for at in (w, w + 1))
        pair = slow.Pair(chosen, rejected, ref[w], ref[w + 1], lengths[w], lengths[w + 1])
        losses.append(SLOW[name](pair).item())
        nats.append(-policy[w] / lengths[w])
    return sum(losses) / len(losses), sum(nats) / len(nats)


@pytest.fixture(scope="module")
def qwen(models: Path) -> Path:
    return models / "qwen2"


@pytest.fixture(scope="module")
def alone(qwen: Path) -> list[float]:
    """Log-prob of each response of ``pairs()``, each forwarded by itself."""
    return programs.plain_logprobs(qwen, pairs())


@pytest.fixture(scope="module")
def other(alone: list[float], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Log-probs of a reference that is another model, and the file of them."""
    noise = torch.randn(len(alone), generator=torch.Generator().manual_seed(1)).tolist()
    values = [logprob + part for logprob, part in zip(alone, noise, strict=True)]
    return values, programs.write_reference(values, tmp_path_factory.mktemp("other") / "reference.arrow")


def test_every_loss_is_checked() -> None:
    assert set(SLOW) == set(NAMES)
    assert set(AT_FIRST) == NEEDS_REFERENCE


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_that_of_responses_scored_alone(
    name: str, qwen: Path, alone: list[float], other: tuple[list[float], Path]
) -> None:
    ref, path = other
    expected, nll = loss_and_nll(name, pairs(), alone, ref)
    expected += nll if name == "orpo" else 0.0
    actor = programs.learner(context(), qwen, config(name), rate=SMALL_STEP)
    assert actor._objective.batch([pairs()]).denominator == NUM_PAIRS
    if name in NEEDS_REFERENCE:
        with pytest.raises(RoleError, match=f"{name} compares with a reference, whose log-probs were not given"):
            actor.evaluate([pairs()])
    actor.use_reference(path)
    found = actor.evaluate([pairs()])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert actor.evaluate([pairs().slice(0, 4), pairs().slice(4)])["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["chosen_logprob"] == pytest.approx(sum(alone[0::2]) / NUM_PAIRS, rel=1e-5)
    assert found["rejected_logprob"] == pytest.approx(sum(alone[1::2]) / NUM_PAIRS, rel=1e-5)
    assert ("ref_kl" in found) == (name in NEEDS_REFERENCE)
    assert actor.train(0, 1, pairs()).metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert actor.evaluate([pairs()])["loss"] < found["loss"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "orpo"])
def test_nll_is_added(name: str, qwen: Path, alone: list[float], other: tuple[list[float], Path]) -> None:
    expected, nll = loss_and_nll(name, pairs(), alone, other[0])
    objective = Preference(config(name, nll_coefficient=0.4))
    objective.use_reference(ReferenceLogprobs(other[1]))
    model = load_causal_lm(ModelConfig(path=str(qwen), dtype="float32"))
    loss, metrics = objective.loss(model, objective.batch([pairs()]).pack(range(NUM_PAIRS), CPU), NUM_PAIRS)
    assert loss.item() == pytest.approx(expected + 0.4 * nll, rel=1e-5)
    assert metrics["chosen_nll"].item() == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype", "lora"),
    [*((name, "float32", False) for name in AT_FIRST), ("dpo", "bfloat16", False), ("dpo", "bfloat16", True)],
)
def test_at_first_policy_and_reference_are_equal(
    name: str, dtype: str, lora: bool, qwen: Path, tmp_path: Path
) -> None:
    rate = 1e-2 if lora else SMALL_STEP
    actor = programs.learner(context(), qwen, config(name), rate=rate, dtype=dtype, lora=lora)
    column, info = actor.score_reference(pairs())
    assert info.num_rows == 2 * NUM_PAIRS
    assert info.num_tokens == sum(map(len, pairs().column("tokens").to_pylist()))
    values = column.column("ref_logprob").to_pylist()
    actor.use_reference(programs.write_reference(values, tmp_path / "reference.arrow"))
    # A difference of log-probs counts beta times; ipo squares it beside 1 / (2 beta).
    exact = dtype == "float32"
    for found in (actor.evaluate([pairs()]), actor.train(0, 1, pairs()).metrics):
        assert found["loss"] == pytest.approx(AT_FIRST[name], abs=(1e-5 if name == "ipo" else 1e-6) if exact else 1e-2)
        assert found["reward_margin"] == pytest.approx(0, abs=1e-6 if exact else 1e-2)
        assert found["ref_kl"] == pytest.approx(0, abs=2e-6 if exact else 5e-2)
    moved = actor.evaluate([pairs()])
    assert moved["loss"] < AT_FIRST[name] and moved["reward_margin"] > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_score_the_reference_in_order(stage: int, qwen: Path, two_ranks: Ranks, alone: list[float]) -> None:
    """The whole, what is left of it, and one pair, of which one rank has none."""
    rows = pairs()
    batches = [rows, rows.slice(0, 2), rows.slice(4, 6)]
    results = two_ranks.run(programs.score_and_digest, qwen, config("orpo"), stage, batches)
    for number, batch in enumerate(batches):
        columns = [columns[number][0] for columns, _ in results]
        whole = pa.Table.from_batches(columns)
        assert whole.column("sequence_id").to_pylist() == batch.column("sequence_id").to_pylist()
        expected = [alone[at] for at in batch.column("sequence_id").to_pylist()]
        assert whole.column("ref_logprob").to_pylist() == pytest.approx(expected, rel=1e-5)
        assert sum(columns[number][1].num_rows for columns, _ in results) == len(batch)
    assert min(len(columns[0][0]) for columns, _ in results) > 0
    (first, scored, trained), other = results[0][1], results[1][1]
    assert [first, scored, trained] == other
    assert first == scored != trained
    actor = programs.learner(context(), qwen, config("orpo"))
    assert actor.model_digest() == first
    assert actor.score_reference(rows)[0].column("ref_logprob").to_pylist() == pytest.approx(alone, rel=1e-5)


def test_digests_tell_dtypes_and_models_apart(models: Path) -> None:
    digests = [
        programs.learner(context(), models / name, config("orpo"), dtype=dtype).model_digest()
        for name, dtype in (("qwen2", "float32"), ("qwen2", "bfloat16"), ("llama", "float32"))
    ]
    assert len(set(digests)) == 3 and {len(digest) for digest in digests} == {32}


@pytest.mark.parametrize("lora", [False, True])
def test_the_start_can_be_scored_while_it_is_there(
    lora: bool, qwen: Path, two_ranks: Ranks, alone: list[float]
) -> None:
    results = two_ranks.run(programs.score_after_training, qwen, config("orpo"), 1, pairs(), lora)
    before = [value for values, _, _ in results for value in values]
    assert before == pytest.approx(alone, rel=1e-5)
    for values, after, changed in results:
        assert abs(changed["chosen_logprob"] - sum(alone[0::2]) / NUM_PAIRS) > 0.1
        if lora:
            assert after == pytest.approx(values, rel=1e-6)
        else:
            assert isinstance(after, str)
            assert "has been trained; its start cannot be scored any more" in after


@pytest.mark.parametrize("settings", [config("dpo"), config("simpo", nll_coefficient=0.2)], ids=["dpo", "simpo"])
def test_one_rank_and_two_learn_the_same(
    settings: PreferenceConfig, qwen: Path, two_ranks: Ranks, one_rank: Ranks, other: tuple[list[float], Path]
) -> None:
    """A batch of one pair among the others: then a rank has none."""
    batches = [pairs(), pairs().slice(0, 2), pairs()]
    (alone_before, alone_reports, alone_after) = one_rank.run(programs.learn, qwen, settings, 1, batches, other[1])[0]
    first, second = two_ranks.run(programs.learn, qwen, settings, 3, batches, other[1])
    assert first == second
    assert first[0] == pytest.approx(alone_before, rel=1e-4, abs=1e-5)
    for report, alone_report in zip(first[1], alone_reports, strict=True):
        assert report == pytest.approx(alone_report, rel=1e-3, abs=1e-4)
    assert first[2] == pytest.approx(alone_after, rel=1e-3, abs=1e-3)
    assert first[2]["loss"] < first[0]["loss"]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_pack_adds_nothing(name: str, qwen: Path, other: tuple[list[float], Path]) -> None:
    model = load_causal_lm(ModelConfig(path=str(qwen), dtype="float32"))
    objective = Preference(config(name))
    objective.use_reference(ReferenceLogprobs(other[1]))
    loss, metrics = objective.loss(model, objective.batch([pairs()]).pack([], CPU), 3)
    assert loss.item() == 0 and all(float(value) == 0 for value in metrics.values())
    loss.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.abs().max() > 0


def test_reference_logprobs_by_sequence(other: tuple[list[float], Path]) -> None:
    values, path = other
    reference = ReferenceLogprobs(path)
    assert reference.of(torch.tensor([5, 0, 5])).tolist() == [values[5], values[0], values[5]]
    assert reference.of(torch.zeros(0, dtype=torch.int64)).tolist() == []
    with pytest.raises(SchemaError, match="sequence 14 has no reference log-prob, there are 14"):
        reference.of(torch.tensor([3, 14]))


def test_files_that_are_no_reference_are_refused(other: tuple[list[float], Path], tmp_path: Path) -> None:
    with pytest.raises(RoleError, match=r"cannot be read from .*missing\.arrow"):
        ReferenceLogprobs(tmp_path / "missing.arrow")
    whole = other[1].read_bytes()
    for name, content in {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not an Arrow file" * 20}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RoleError, match=f"cannot be read from .*{name}"):
            ReferenceLogprobs(tmp_path / name)
    scores = make_batch(SCORES, {"sample_id": [0], "score": [0.5]})
    write_table(pa.Table.from_batches([scores]), tmp_path / "scores")
    with pytest.raises(SchemaError, match="ref_sequence_logprobs"):
        ReferenceLogprobs(tmp_path / "scores")
    table = pa.ipc.open_file(pa.memory_map(str(other[1]))).read_all()
    write_table(table.slice(1), tmp_path / "late")
    with pytest.raises(SchemaError, match=r"not 0, 1, 2 \.\.\. in order"):
        ReferenceLogprobs(tmp_path / "late")


def test_unknown_sequences_are_refused(qwen: Path, other: tuple[list[float], Path]) -> None:
    actor = programs.learner(context(), qwen, config("dpo"))
    actor.use_reference(other[1])
    with pytest.raises(SchemaError, match="sequence 15 has no reference log-prob"):
        actor.evaluate([pairs(8)])


@pytest.mark.parametrize(
    "algorithm",
    [SupervisedConfig(name="sft", batch_size=8), RewardModelConfig(batch_size=8)],
    ids=["sft", "reward_model"],
)
def test_only_preferences_take_a_reference(
    algorithm: LearningConfig, models: Path, other: tuple[list[float], Path]
) -> None:
    actor = programs.learner(context(), models / "qwen2", algorithm)
    with pytest.raises(RoleError, match="what it learns compares with no reference"):
        actor.use_reference(other[1])


def test_preferences_are_over_pairs(qwen: Path) -> None:
    rows = programs.ranked([[0, 1], [0, 1, 2]])
    with pytest.raises(SchemaError, match="over pairs, and one has 3 responses"):
        PairBatch([rows])
    with pytest.raises(SchemaError, match="over pairs"):
        programs.learner(context(), qwen, config("dpo")).score_reference(rows)
    with pytest.raises(SchemaError, match="two or more rows that stand together"):
        PairBatch([pairs().slice(0, 3)])


def test_a_pair_may_come_twice_in_a_row() -> None:
    twice = pairs().take(pa.array([0, 1, 0, 1, 2, 3]))
    batch = PairBatch([twice])
    assert batch.denominator == 3
    assert batch.pack([1], CPU).sequence_ids_N.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing belongs to conservative_dpo, robust_dpo, not to dpo"),
        ("ipo", {"target_margin": 2.0}, "target_margin belongs to simpo, slic, not to ipo"),
        ("simpo", {"odds_coefficient": 0.5}, "odds_coefficient belongs to orpo, not to simpo"),
        ("slic", {"beta": 2.0}, "beta belongs to .*dpo, .*simpo, not to slic; leave it out"),
        ("orpo", {"beta": 2.0}, "beta belongs to .*simpo, not to orpo"),
        ("conservative_dpo", {"label_smoothing": 0.0}, "needs label_smoothing above 0; with 0 it is dpo"),
        ("robust_dpo", {"label_smoothing": 0.0}, "needs label_smoothing above 0"),
        ("robust_dpo", {"label_smoothing": 0.5}, "less than 0.5"),
        ("orpo", {"nll_coefficient": 0.1}, "orpo has its NLL term already"),
        ("orpo", {"odds_coefficient": 0.0}, "greater than 0"),
        ("dpo", {"beta": 0.0}, "greater than 0"),
        ("slic", {"target_margin": -1.0}, "greater than or equal to 0"),
        ("dpo", {"nll_coefficient": -1.0}, "greater than or equal to 0"),
        ("kto", {}, "Input should be 'dpo'"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(
    name: str, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(name, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_configuration_is_read_again(name: str) -> None:
    """It writes out the defaults of keys that belong to other losses."""
    assert PreferenceConfig(**config(name).model_dump()) == config(name)
