"""Several rewards in credit assignment: how their scores travel, what they come to, and what is kept of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.credit import CreditActor
from actors.credit_columns import NotFinite
from actors.rewards.combination_config import TotalConfig
from actors.score_columns import Totals
from algorithms.config import OnlineConfig
from algorithms.moments import RunningMoments
from cluster.context import RankContext
from experience.schema import PROMPTS, ROLLOUT, SCORES, SchemaError, make_batch
from experience.table import Experience, join
from tests.actors.test_credit import Sample, columns, random_samples

PIECEWISE = {"kind": "piecewise", "helpfulness": "help", "safety": "safe", "tag_column": "kind", "whiten": False}


def scores(samples: list[Sample], *columns_of: list[float], cut: int = 2) -> list[pa.RecordBatch]:
    """Reward after reward, each in two batches."""
    ids = [sample.sample_id for sample in samples]
    whole = [make_batch(SCORES, {"sample_id": ids, "score": numbers}) for numbers in columns_of]
    return [part for batch in whole for part in (batch.slice(0, cut), batch.slice(cut))]


def actor(total: dict[str, Any], *names: str) -> CreditActor:
    context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", torch.get_num_threads(), None, 0)
    config = OnlineConfig.model_validate({"name": "reinforce_plus_plus", "kl": {"coefficient": 0}})
    return CreditActor(context, config, 64, names, TotalConfig.model_validate(total))


def given(samples: list[Sample], parts: list[pa.RecordBatch]) -> dict[str, Any]:
    empty: dict[str, Any] = {"ref_logprobs": [], "values": [], "policy_logprobs": [], "scores": parts}
    return columns(samples) | empty | {"kl_coefficient": 0.0, "policy_version": 5}


def test_scores_are_told_apart_added_and_kept(tmp_path: Path) -> None:
    samples = random_samples([3, 1, 4])
    parts = scores(samples, [1.0, 2.0, 3.0], [0.5, 0.0, -0.5])
    credit = actor({"combine": {"kind": "linear", "weights": {"a": 2, "b": 4}}}, "a", "b")
    _, report = credit.assign(**given(samples, parts), keep_at=tmp_path / "kept.arrow")
    assert report.metrics["reward/a"] == 2.0 and report.metrics["reward/b"] == 0.0
    assert report.metrics["reward/combined"] == report.metrics["experience/score"] == 4.0
    table = Experience.open(tmp_path / "kept.arrow").table
    assert table.column("score_a").to_pylist() == [1.0, 2.0, 3.0]
    assert table.column("score_b").to_pylist() == [0.5, 0.0, -0.5]
    assert table.column("score").to_pylist() == [4.0, 4.0, 4.0]


def test_scores_of_other_rows_and_without_a_number_are_refused() -> None:
    samples = random_samples([3, 1, 4])
    credit = actor({}, "a", "b")
    parts = scores(samples, [1.0, 2.0, 3.0], [0.5, 0.0, math.nan])
    with pytest.raises(NotFinite, match="sample 102: score_b is nan"):
        credit.assign(**given(samples, parts), keep_at=None)
    with pytest.raises(SchemaError, match="3 of a, 1 of b, and 0 more, for 3 samples"):
        credit.assign(**given(samples, parts[:-2] + parts[-1:]), keep_at=None)
    with pytest.raises(SchemaError, match="3 of a, 3 of b, and 2 more"):
        credit.assign(**given(samples, [*parts, parts[0]]), keep_at=None)
    combined, num_rows = credit.combine(columns(samples)["rollouts"], parts)
    assert num_rows == 3 and combined.column("score").to_pylist()[:2] == [1.5, 2.0]
    assert math.isnan(combined.column("score")[2].as_py())


def test_safety_prompts_are_tagged_by_their_row() -> None:
    """Samples 100 and 101 are of prompt 50, which is one of safety; 102 of 51, which is not. Threshold -1.73."""
    samples = random_samples([3, 1, 4])
    credit = actor({"combine": PIECEWISE}, "help", "safe")
    rollouts = columns(samples)["rollouts"]
    rows = {"tokens": [[1]] * 2, "source": [""] * 2, "columns": ['{"kind": "safety"}', '{"kind": "help"}']}
    tags, _ = credit.safety_prompts(rollouts, [make_batch(PROMPTS, {"prompt_id": [50, 51], **rows})])
    assert tags.column("score").to_pylist() == [1.0, 1.0, 0.0]
    parts = [*scores(samples, [5.0, 6.0, 7.0], [0.5, 0.25, 0.0]), tags]
    _, report = credit.assign(**given(samples, parts), keep_at=None)
    assert report.metrics["reward/combined"] == pytest.approx((0.5 + 0.25 + 7.0) / 3)


def test_signal_is_looked_for_before_shaping() -> None:
    """A penalty of length makes scores differ that say the same; whitening cannot be done over a slice."""
    samples = random_samples([3, 1, 4, 2])
    shaping = {"length": {"kind": "length", "penalty_per_token": 1.0}}
    credit = actor({"combine": {**PIECEWISE, "tag_column": None, "whiten": True}, "shaping": shaping}, "help", "safe")
    parts = scores(samples, [5.0, 5.0, 7.0, 6.0], [3.0, 2.0, 1.0, 1.0])
    assert credit.without_signal(columns(samples)["rollouts"], parts) == (50,)


def test_moments_run_on() -> None:
    samples = random_samples([3, 1])
    credit = actor({"shaping": {"scale": {"kind": "normalise", "by": "running"}}}, "a")
    parts = scores(samples, [3.0, 5.0], cut=1)
    _, first = credit.assign(**given(samples, parts), keep_at=None)
    assert dict(first.moments) == {"scale": RunningMoments(2, 4.0, 2.0)}
    _, second = credit.assign(**given(samples, parts), keep_at=None, moments=first.moments)
    assert second.moments["scale"].count == 4


def test_an_environments_words_are_no_repetition_of_the_policys() -> None:
    said = {"tokens": [[9, 1, 2, 7, 7, 7, 1, 3]], "turn_starts": [[1, 6]], "turn_ends": [[3, 8]]}
    rollout = make_batch(
        ROLLOUT,
        said
        | {"sample_id": [4], "prompt_id": [4], "num_prompt_tokens": [1], "environment_rewards": [[0.0] * 4]}
        | {"rollout_logprobs": [[-1.0] * 4], "policy_versions": [[0] * 4], "finish_reason": ["stop"]},
    )
    shaping = {"again": {"kind": "repetition", "ngram": 1, "penalty": 1.0}}
    totals = Totals(["reward"], TotalConfig.model_validate({"shaping": shaping}), 64)
    total = totals.of(join([rollout]).table, {"reward": torch.tensor([2.0], dtype=torch.float64)})
    assert total.scores_N.tolist() == [2.0 - 1 / 4]
