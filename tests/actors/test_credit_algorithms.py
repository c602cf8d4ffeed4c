"""Credit without a critic: every algorithm against slow code, from the roles' columns to the policy's."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.credit import CreditActor, CreditReport
from actors.rewards.combination_config import TotalConfig
from algorithms.config import OnlineConfig
from algorithms.needs import BUILT_IN
from cluster.context import RankContext
from experience.schema import BASELINE_SCORES, CREDIT, check_schema, make_batch
from tests.actors.test_credit import Sample, approx, columns, flat, random_samples
from tests.algorithms import slow
from tests.algorithms.test_group_advantages import slow_by_group

LENGTHS = [3, 1, 17, 2, 9, 33, 5, 4]
MAX_RESPONSE_TOKENS = 40
CRITIC_FREE = [name for name, needs in BUILT_IN.items() if not needs.critic]


def assign(
    samples: list[Sample],
    settings: dict[str, Any],
    *,
    absent: tuple[str, ...] = ("values", "policy_logprobs"),
    baselines: list[float] | None = None,
    coefficient: float = 0.1,
    shaping: dict[str, Any] | None = None,
) -> tuple[pa.RecordBatch, CreditReport]:
    context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", torch.get_num_threads(), None, 0)
    given = columns(samples) | {name: [] for name in absent}
    if baselines is not None:
        ids = [sample.sample_id for sample in samples]
        given["baseline_scores"] = [make_batch(BASELINE_SCORES, {"sample_id": ids, "baseline_score": baselines})]
    total = TotalConfig.model_validate({"shaping": shaping or {}})
    actor = CreditActor(context, OnlineConfig.model_validate(settings), MAX_RESPONSE_TOKENS, ("reward",), total)
    return actor.assign(**given, kl_coefficient=coefficient, policy_version=5, keep_at=None)


def slow_advantages(name: str, rewards: list[list[float]], prompts: list[int], baselines: list[float]) -> list[float]:
    """Of every token, by the definitions."""
    totals = [sum(row) for row in rewards]
    match name:
        case "grpo" | "dr_grpo" | "rloo" | "turn_grpo":  # of one turn each, the last is the first
            each = slow_by_group(name.removeprefix("turn_"), totals, prompts)
        case "remax" | "initial_baseline":
            each = [total - baseline for total, baseline in zip(totals, baselines, strict=True)]
        case "reinforce_plus_plus":
            return slow.whiten([sum(row[at:]) for row in rewards for at in range(len(row))])
        case "reinforce_plus_plus_baseline":
            centred = slow_by_group("dr_grpo", totals, prompts)
            return slow.whiten([a for a, row in zip(centred, rewards, strict=True) for _ in row])
        case _:
            raise AssertionError(name)
    return [advantage for advantage, row in zip(each, rewards, strict=True) for _ in row]


@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("name", CRITIC_FREE)
def test_equals_slow_code(name: str, placement: str) -> None:
    samples, baselines = random_samples(LENGTHS), [0.5, -1.0, 2.0, 0.0, 1.0, 0.25, -0.5, 3.0]
    settings, shaping = {"name": name, "kl": {"placement": placement}}, {"eos": {"kind": "missing_eos", "penalty": 0.5}}
    given = baselines if BUILT_IN[name].baseline != "none" else None
    credit, report = assign(samples, settings, baselines=given, shaping=shaping)
    check_schema(credit, CREDIT)
    shaped = [slow.shape_score(s.score, s.finish_reason == "stop", None, None, 0.5) for s in samples]
    rewards = []
    for score, sample in zip(shaped, samples, strict=True):
        pairs = zip(sample.rollout_logprobs, sample.ref_logprobs, strict=True)
        penalties = [-0.1 * (p - q) if placement == "reward" else 0.0 for p, q in pairs]
        rewards.append([*penalties[:-1], penalties[-1] + score])
    prompts = [sample.sample_id // 2 for sample in samples]
    assert flat(credit, "advantages") == approx(slow_advantages(name, rewards, prompts, baselines))
    assert flat(credit, "behaviour_logprobs") == [number for s in samples for number in s.rollout_logprobs]
    assert flat(credit, "loss_weights") == [1.0] * sum(LENGTHS)
    metrics = {name.removeprefix("experience/"): number for name, number in report.metrics.items()}
    assert metrics["reward"] == pytest.approx(sum(map(sum, rewards)) / len(samples))
    assert not metrics.keys() & {"value", "return", "explained_variance"}
    assert "kl_per_sample" in metrics
    assert metrics["no_signal_fraction"] == 0
    assert ("baseline_score" in metrics) == (given is not None)


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_without_a_reference(name: str) -> None:
    """A column is there exactly when its role is: no KL is measured, and none is in the reward."""
    samples, baselines = random_samples(LENGTHS), [0.0] * len(LENGTHS)
    given = baselines if BUILT_IN[name].baseline != "none" else None
    settings = {"name": name, "kl": {"coefficient": 0.0}}
    absent = ("values", "policy_logprobs", "ref_logprobs")
    credit, report = assign(samples, settings, absent=absent, baselines=given, coefficient=0.0)
    rewards = [[0.0] * (length - 1) + [s.score] for length, s in zip(LENGTHS, samples, strict=True)]
    prompts = [sample.sample_id // 2 for sample in samples]
    assert flat(credit, "advantages") == approx(slow_advantages(name, rewards, prompts, baselines))
    assert not [metric for metric in report.metrics if "kl" in metric]


def test_groups_without_signal_get_exactly_nothing_and_are_counted() -> None:
    samples = random_samples(LENGTHS)
    for sample in samples[2:6]:
        sample.score = 0.1
    for name in ("grpo", "dr_grpo", "rloo"):
        credit, report = assign(samples, {"name": name, "kl": {"placement": "loss"}})
        assert report.metrics["experience/no_signal_fraction"] == 0.5
        for row in credit.column("advantages").to_pylist()[2:6]:
            assert row == [0.0] * len(row)


def test_overlong_responses_are_penalised_and_truncated_ones_masked() -> None:
    """Longest 40, margin 8: a response of 33 tokens is one over 32, so it loses 1/8 of the penalty."""
    samples = random_samples(LENGTHS)
    shaping = {"overlong": {"kind": "overlong", "margin_tokens": 8, "penalty": 2.0}}
    settings = {"name": "remax", "kl": {"coefficient": 0.0}, "mask_truncated": True}
    credit, report = assign(samples, settings, baselines=[0.0] * 8, coefficient=0.0, shaping=shaping)
    expected = [s.score - (0.25 if length == 33 else 0.0) for s, length in zip(samples, LENGTHS, strict=True)]
    assert [row[0] for row in credit.column("advantages").to_pylist()] == approx(expected)
    for row, sample in zip(credit.column("loss_weights").to_pylist(), samples, strict=True):
        assert row == [float(sample.finish_reason == "stop")] * len(row)
    assert report.metrics["experience/shaped_score"] == pytest.approx(sum(expected) / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("correction", "weigh"),
    [
        ({"method": "truncated", "cap": 1.5}, lambda k, mean: min(k, 1.5)),
        ({"method": "masked", "low": 0.5, "high": 2.0}, lambda k, mean: k if 0.5 <= k <= 2 else 0.0),
        ({"method": "decoupled", "cap": 3.0}, lambda k, mean: k if k <= 3 else 0.0),
        (
            {"method": "sequence_masked", "low": 0.7, "high": 1.4, "cap": 1.5},
            lambda k, mean: min(k, 1.5) if 0.7 <= mean <= 1.4 else 0.0,
        ),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_corrections_weigh_tokens_by_who_drew_them(correction: dict[str, Any], weigh: Any) -> None:
    """Against the definition; the ratio is then against the recomputed log-probs."""
    samples = random_samples(LENGTHS)
    settings = {"name": "grpo", "correction": correction}
    credit, report = assign(samples, settings, absent=("values",))
    weights, touched = [], 0
    for s in samples:
        ks = [math.exp(p - q) for p, q in zip(s.policy_logprobs, s.rollout_logprobs, strict=True)]
        mean = math.exp(sum(map(math.log, ks)) / len(ks))
        weights += [weigh(k, mean) for k in ks]
        touched += sum(weigh(k, mean) != k for k in ks)
    assert flat(credit, "loss_weights") == approx(weights)
    assert flat(credit, "behaviour_logprobs") == [number for s in samples for number in s.policy_logprobs]
    assert 0 < touched < sum(LENGTHS)
    assert report.metrics["experience/correction_fraction"] == pytest.approx(touched / sum(LENGTHS))
    assert report.metrics["experience/correction_weight"] == pytest.approx(sum(weights) / sum(LENGTHS), rel=1e-5)
    assert report.metrics["experience/correction_kl"] > 0


def test_without_a_correction_nothing_is_logged_of_one() -> None:
    _, report = assign(random_samples(LENGTHS), {"name": "grpo", "recompute_logprobs": True}, absent=("values",))
    assert not [name for name in report.metrics if "correction" in name]
    assert "experience/engine_logprob_gap" in report.metrics
