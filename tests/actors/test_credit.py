"""The credit role: from columns to advantages, returns and metrics."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.credit import CreditActor, CreditReport
from actors.credit_columns import NotFinite
from actors.errors import RoleError
from actors.rewards.combination_config import TotalConfig
from algorithms.config import OnlineConfig
from cluster.context import RankContext
from experience.schema import (
    CREDIT_WITH_RETURNS,
    POLICY_LOGPROBS,
    REF_LOGPROBS,
    ROLLOUT,
    SCORES,
    VALUES,
    SchemaError,
    check_schema,
    make_batch,
)
from experience.table import Experience
from experience.turns import one_turn_each
from tests.algorithms import slow

MAX_RESPONSE_TOKENS = 64
PLAIN: dict[str, Any] = {"whiten_advantages": False, "gamma": 0.9, "gae_lambda": 0.8}


@dataclasses.dataclass
class Sample:
    """One row of everything, as Python numbers."""

    sample_id: int
    rollout_logprobs: list[float]
    ref_logprobs: list[float]
    values: list[float]
    score: float
    policy_logprobs: list[float]
    versions: list[int]
    finish_reason: str = "stop"
    num_prompt_tokens: int = 2


def random_samples(lengths: list[int], seed: int = 0) -> list[Sample]:
    source = torch.Generator().manual_seed(seed)

    def numbers(length: int, shift: float = 0.0) -> list[float]:
        drawn: list[float] = (torch.randn(length, generator=source) + shift).tolist()
        return drawn

    return [
        Sample(
            sample_id=100 + row,
            rollout_logprobs=numbers(length, -2),
            ref_logprobs=numbers(length, -2),
            values=numbers(length),
            score=numbers(1)[0],
            policy_logprobs=numbers(length, -2),
            versions=[3 + (token % 2) for token in range(length)],
            finish_reason="length" if row % 3 == 1 else "stop",
            num_prompt_tokens=1 + row % 4,
        )
        for row, length in enumerate(lengths)
    ]


def columns(samples: list[Sample], cut: int | None = None) -> dict[str, Any]:
    """The samples as the roles' batches; with ``cut`` each column in two, the rollouts cut one row later."""

    def batches(schema: pa.Schema, later: int = 0, **given: Any) -> list[pa.RecordBatch]:
        whole = make_batch(schema, {"sample_id": [s.sample_id for s in samples], **given})
        return [whole] if cut is None else [whole.slice(0, cut + later), whole.slice(cut + later)]

    return {
        "rollouts": batches(
            ROLLOUT,
            later=1,
            prompt_id=[s.sample_id // 2 for s in samples],
            tokens=[[5] * (s.num_prompt_tokens + len(s.rollout_logprobs)) for s in samples],
            num_prompt_tokens=[s.num_prompt_tokens for s in samples],
            **one_turn_each(
                [s.num_prompt_tokens for s in samples],
                [s.num_prompt_tokens + len(s.rollout_logprobs) for s in samples],
            ),
            rollout_logprobs=[s.rollout_logprobs for s in samples],
            policy_versions=[s.versions for s in samples],
            finish_reason=[s.finish_reason for s in samples],
        ),
        "ref_logprobs": batches(REF_LOGPROBS, ref_logprobs=[s.ref_logprobs for s in samples]),
        "values": batches(VALUES, values=[s.values for s in samples]),
        "scores": batches(SCORES, score=[s.score for s in samples]),
        "policy_logprobs": batches(POLICY_LOGPROBS, policy_logprobs=[s.policy_logprobs for s in samples]),
        "baseline_scores": [],
    }


def assign(
    samples: list[Sample],
    settings: dict[str, Any],
    *,
    coefficient: float = 0.1,
    recomputed: bool = False,
    cut: int | None = None,
    version: int = 5,
    keep_at: Path | None = None,
    shaping: dict[str, Any] | None = None,
) -> tuple[pa.RecordBatch, CreditReport]:
    context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", torch.get_num_threads(), None, 0)
    given = columns(samples, cut)
    if not recomputed:
        given["policy_logprobs"] = []
    total = TotalConfig.model_validate({"shaping": shaping or {}})
    config = OnlineConfig.model_validate(settings)
    return CreditActor(context, config, MAX_RESPONSE_TOKENS, ("reward",), total).assign(
        **given, kl_coefficient=coefficient, policy_version=version, keep_at=keep_at
    )


def flat(credit: pa.RecordBatch, name: str) -> list[float]:
    return [number for row in credit.column(name).to_pylist() for number in row]


def approx(numbers: list[float] | float) -> Any:
    return pytest.approx(numbers, abs=2e-6, rel=2e-6)


def test_by_hand() -> None:
    """Two samples; gamma and lambda 0.5, KL coefficient 0.1, clip 5, penalty 1 for a missing EOS.

    First: log-probs -1, -1 against -3, -1: penalties -0.2, 0. Score 9, clipped to 5. Rewards -0.2, 5. Values 1, 2:
    delta_1 = 5 - 2 = 3; delta_0 = -0.2 + 0.5 * 2 - 1 = -0.2. A_1 = 3; A_0 = -0.2 + 0.25 * 3 = 0.55.
    Returns 1.55, 5.
    Second, cut off: log-prob -2 against -1: penalty 0.1. Score 2 - 1 = 1. Reward 1.1. Value 4: A -2.9, return 1.1.
    """
    samples = [
        Sample(7, [-1.0, -1.0], [-3.0, -1.0], [1.0, 2.0], 9.0, [-1.5, -1.0], [4, 5]),
        Sample(9, [-2.0], [-1.0], [4.0], 2.0, [-2.25], [2], finish_reason="length", num_prompt_tokens=3),
    ]
    settings = {
        "gamma": 0.5,
        "gae_lambda": 0.5,
        "whiten_advantages": False,
    }
    shaping = {"bounds": {"kind": "clip"}, "eos": {"kind": "missing_eos", "penalty": 1.0}}
    credit, report = assign(samples, settings, shaping=shaping)
    check_schema(credit, CREDIT_WITH_RETURNS)
    assert credit.column("sample_id").to_pylist() == [7, 9]
    assert [len(row) for row in credit.column("advantages").to_pylist()] == [2, 1]
    assert flat(credit, "advantages") == approx([0.55, 3.0, -2.9])
    assert flat(credit, "returns") == approx([1.55, 5.0, 1.1])
    assert flat(credit, "behaviour_logprobs") == [-1.0, -1.0, -2.0]
    assert flat(credit, "loss_weights") == [1.0, 1.0, 1.0]
    # Returns 1.55, 5, 1.1: mean 2.55, variance (1 + 6.0025 + 2.1025) / 3 = 3.035. Advantages: mean 0.216667,
    # variance (0.111111 + 7.746944 + 9.713611) / 3 = 5.857222, which is also what the values leave unexplained.
    expected = {
        "score": 5.5,
        "score_std": 3.5,
        "shaped_score": 3.0,
        "reward": (4.8 + 1.1) / 2,
        "kl_per_sample": (2.0 - 1.0) / 2,
        "kl_per_token": 1 / 3,
        "response_tokens": 1.5,
        "response_tokens_max": 2.0,
        "truncated_fraction": 0.5,
        "value": 7 / 3,
        "return": 2.55,
        "explained_variance": 1 - 5.857222 / 3.035,
        "advantage": 0.216667,
        "advantage_std": math.sqrt(5.857222),
        "staleness_mean": (1 + 0 + 3) / 3,
        "staleness_max": 3.0,
    }
    terms = {"reward": 5.5, "reward_std": 3.5, "combined": 5.5, "bounds": -2.0, "eos": -0.5}
    terms |= {"total": 3.0, "total_std": 2.0}
    named = {"experience": expected, "reward": terms}
    assert report.metrics == {
        f"{group}/{name}": approx(number) for group, found in named.items() for name, number in found.items()
    }
    assert report.kl_coefficient == 0.1
    assert report.seconds > 0


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("whiten_advantages", [False, True])
def test_equals_slow_code(recomputed: bool, whiten_rewards: bool, whiten_advantages: bool) -> None:
    samples = random_samples([3, 1, 17, 2, 9, 33])
    settings = PLAIN | {
        "whiten_advantages": whiten_advantages,
        "whiten_rewards": whiten_rewards,
    }
    shaping = {
        "bounds": {"kind": "clip", "low": -0.8, "high": 0.8},
        "cut": {"kind": "truncation", "score": -1.0},
        "eos": {"kind": "missing_eos", "penalty": 0.5},
    }
    credit, report = assign(samples, settings, recomputed=recomputed, shaping=shaping)

    behaviour = [s.policy_logprobs if recomputed else s.rollout_logprobs for s in samples]
    shaped = [slow.shape_score(s.score, s.finish_reason == "stop", 0.8, -1.0, 0.5) for s in samples]
    rewards = [
        slow.rewards(score, logprobs, s.ref_logprobs, 0.1)
        for score, logprobs, s in zip(shaped, behaviour, samples, strict=True)
    ]
    total = sum(map(sum, rewards)) / len(samples)
    if whiten_rewards:
        numbers = iter(slow.whiten([number for row in rewards for number in row], shift_mean=False))
        rewards = [[next(numbers) for _ in row] for row in rewards]
    pairs = [slow.gae(row, s.values, 0.9, 0.8) for row, s in zip(rewards, samples, strict=True)]
    advantages = [number for pair in pairs for number in pair[0]]
    returns = [number for pair in pairs for number in pair[1]]
    assert flat(credit, "advantages") == approx(slow.whiten(advantages) if whiten_advantages else advantages)
    assert flat(credit, "returns") == approx(returns)
    assert flat(credit, "behaviour_logprobs") == [number for row in behaviour for number in row]
    kl = [p - q for row, s in zip(behaviour, samples, strict=True) for p, q in zip(row, s.ref_logprobs, strict=True)]
    metrics = {name.removeprefix("experience/"): number for name, number in report.metrics.items()}
    assert metrics["kl_per_sample"] == pytest.approx(sum(kl) / 6)
    assert metrics["kl_per_token"] == pytest.approx(sum(kl) / 65)
    assert metrics["shaped_score"] == pytest.approx(sum(shaped) / 6)
    assert metrics["reward"] == pytest.approx(total), "before whitening"
    assert metrics["advantage"] == pytest.approx(sum(advantages) / 65), "before whitening"
    assert metrics["truncated_fraction"] == pytest.approx(2 / 6)
    assert ("engine_logprob_gap" in metrics) == recomputed
    if recomputed:
        gaps = [abs(a - b) for s in samples for a, b in zip(s.policy_logprobs, s.rollout_logprobs, strict=True)]
        assert metrics["engine_logprob_gap"] == pytest.approx(sum(gaps) / 65)
        assert metrics["engine_logprob_gap_max"] == pytest.approx(max(gaps))


def test_without_penalty_it_is_the_score_alone() -> None:
    """Coefficient 0, gamma and lambda 1: every token's return is its sample's score."""
    samples = random_samples([4, 2, 7])
    credit, _ = assign(samples, {"gamma": 1.0, "gae_lambda": 1.0}, coefficient=0.0)
    for row, sample in zip(credit.column("returns").to_pylist(), samples, strict=True):
        assert row == approx([sample.score] * len(row))


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_batch() -> None:
    credit, report = assign(random_samples([5, 60, 1, 13]), {})
    advantages = torch.tensor(flat(credit, "advantages"), dtype=torch.float64)
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert abs(report.metrics["experience/advantage"]) > 1e-3


@pytest.mark.parametrize("settings", [PLAIN, {"whiten_rewards": True}])
def test_order_and_cuts_do_not_matter(settings: dict[str, Any]) -> None:
    """Slices arrive as engines finish them, and ranks cut them elsewhere: the same credit for every sample."""
    samples = random_samples([3, 1, 17, 2, 9, 5])
    credit, report = assign(samples, settings, recomputed=True)
    cut_credit, cut_report = assign(samples, settings, recomputed=True, cut=2)
    assert cut_credit.equals(credit)
    assert cut_report.metrics == report.metrics
    moved = [samples[row] for row in (4, 0, 5, 2, 1, 3)]
    moved_credit, moved_report = assign(moved, settings, recomputed=True)
    rows = {row["sample_id"]: row for row in credit.to_pylist()}
    for row in moved_credit.to_pylist():
        for name in ("advantages", "returns", "behaviour_logprobs"):
            assert row[name] == approx(rows[row["sample_id"]][name])
    assert moved_report.metrics == pytest.approx(report.metrics, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["rollout_logprobs", "ref_logprobs", "values", "policy_logprobs"])
@pytest.mark.parametrize("token", [0, 2])
def test_refuses_numbers_that_are_not_finite(column: str, number: float, token: int) -> None:
    samples = random_samples([3, 4, 2])
    getattr(samples[1], column)[token] = number
    with pytest.raises(NotFinite, match=f"sample 101: {column} of response token {token} is {number}") as caught:
        assign(samples, {}, recomputed=True, cut=1)
    assert isinstance(caught.value, RoleError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "it comes through to the driver"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_refuses_scores_that_are_not_finite(number: float) -> None:
    """Also where the score would be replaced or clipped: a reward model that gives NaN is broken."""
    samples = random_samples([3, 4, 2])
    samples[1].score = number
    with pytest.raises(NotFinite, match=f"sample 101: score is {number}; a reward model must give a finite number"):
        assign(samples, {}, shaping={"bounds": {"kind": "clip"}, "cut": {"kind": "truncation"}})


def test_refuses_rows_that_do_not_belong_together() -> None:
    samples, others = random_samples([3, 4]), random_samples([3, 4])
    others[1].sample_id = 999
    context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", 1, None, 0)
    actor = CreditActor(context, OnlineConfig(), MAX_RESPONSE_TOKENS)
    given = columns(samples) | {"scores": columns(others)["scores"], "policy_logprobs": []}
    with pytest.raises(SchemaError, match="999"):
        actor.assign(**given, kl_coefficient=0.1, policy_version=5, keep_at=None)
    others = random_samples([3, 5])
    given = columns(samples) | {"values": columns(others)["values"], "policy_logprobs": []}
    with pytest.raises(SchemaError, match="values of sample 101 has 5 values for a response of 4 tokens"):
        actor.assign(**given, kl_coefficient=0.1, policy_version=5, keep_at=None)


def test_refuses_samples_that_make_no_sense() -> None:
    samples = random_samples([3, 4])
    with pytest.raises(SchemaError, match=r"sample 100 has a token of policy version 4, but .* from version 3"):
        assign(samples, {}, version=3)
    samples[1].finish_reason = "abort"
    with pytest.raises(SchemaError, match="finish_reason of sample 101 is 'abort'"):
        assign(samples, {})
    with pytest.raises(SchemaError, match="response of sample 101 has no token"):
        assign(random_samples([3, 0]), {})
    with pytest.raises(SchemaError, match="no rows to assign credit to"):
        assign([], {})


def test_keeps_the_experience(tmp_path: Path) -> None:
    samples = random_samples([3, 4, 2])
    credit, _ = assign(samples, {}, coefficient=0.25, recomputed=True, cut=1, keep_at=tmp_path / "kept.arrow")
    kept = Experience.open(tmp_path / "kept.arrow")
    assert kept.metadata == {"policy_version": "5", "kl_coefficient": "0.25"}
    assert kept.table.column("advantages").to_pylist() == credit.column("advantages").to_pylist()
    assert kept.table.column("policy_logprobs").to_pylist() == [approx(s.policy_logprobs) for s in samples]
    assert kept.table.column("score").to_pylist() == approx([s.score for s in samples])
