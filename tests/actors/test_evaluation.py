"""What held-out responses are worth, against values worked by hand and against all choices spelled out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pytest

from actors.credit import CreditActor
from actors.evaluation import EvaluationRules, evaluate, samples_table
from actors.rewards.combination_config import TotalConfig
from algorithms.config import OnlineConfig
from algorithms.errors import AlgorithmError
from cluster.context import RankContext
from experience.schema import ROLLOUT, SCORES, SchemaError, make_batch
from experience.table import open_table, write_table
from experience.turns import one_turn_each

NAN = math.nan


class Letters:
    """A tokenizer of one letter a token, whose token 0 is special."""

    all_special_ids = (0,)

    def decode(self, tokens: Sequence[int], **_: bool) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


def responses(prompt_ids: Sequence[int], lengths: Sequence[int], num_cut: int = 0) -> pa.RecordBatch:
    """Responses of these lengths, closed by the special token; the first so many are cut off."""
    rows = range(len(prompt_ids))
    totals = [2 + length for length in lengths]
    return make_batch(
        ROLLOUT,
        {
            "sample_id": list(rows),
            "prompt_id": list(prompt_ids),
            "tokens": [[1, 2, *[3 + row % 7] * (lengths[row] - 1), 0] for row in rows],
            "num_prompt_tokens": [2] * len(prompt_ids),
            **one_turn_each([2] * len(prompt_ids), totals),
            "rollout_logprobs": [[-1.0] * length for length in lengths],
            "policy_versions": [[4] * length for length in lengths],
            "finish_reason": ["length"] * num_cut + ["stop"] * (len(prompt_ids) - num_cut),
        },
    )


def scores(values: Sequence[float], first_id: int = 0) -> pa.RecordBatch:
    return make_batch(SCORES, {"sample_id": list(range(first_id, first_id + len(values))), "score": list(values)})


def test_worked_by_hand() -> None:
    """Two prompts of two samples: 0 and 1, and 1 and 1."""
    rollout = responses([7, 7, 3, 3], [2, 3, 4, 7], num_cut=1)
    metrics = evaluate([rollout], {"score": [scores([0, 1, 1, 1])]}, EvaluationRules((1, 2), {"score": 1.0}))
    assert metrics == pytest.approx(
        {
            # Means 0.5 and 1, whose deviation is 0.5 / sqrt(2).
            "score": 0.75, "score_error": 0.25, "pass_at_1": 0.75, "pass_at_2": 1.0, "best_of_2": 1.0,
            "unscored_fraction": 0.0, "response_tokens": 4.0, "response_tokens_max": 7.0, "truncated_fraction": 0.25,
        }
    )  # fmt: skip


def test_against_all_choices_in_any_order_and_cut_anywhere() -> None:
    source = random.Random(5)
    prompt_ids = [prompt for prompt in range(5) for _ in range(4)]
    values = [source.choice([-1.5, 0.0, 0.25, 1.0, 2.0]) for _ in prompt_ids]
    source.shuffle(prompt_ids)
    rollout = responses(prompt_ids, [1 + row % 5 for row in range(20)])
    rules = EvaluationRules((1, 2, 3, 4), {"score": 0.25})
    metrics = evaluate([rollout], {"score": [scores(values)]}, rules)
    groups = [[value for value, of in zip(values, prompt_ids, strict=True) if of == prompt] for prompt in range(5)]
    for k in rules.ks:
        best = [fmean(max(choice) for choice in combinations(group, k)) for group in groups]
        passed = [fmean(max(choice) >= 0.25 for choice in combinations(group, k)) for group in groups]
        assert metrics[f"pass_at_{k}"] == pytest.approx(fmean(passed))
        assert k == 1 or metrics[f"best_of_{k}"] == pytest.approx(fmean(best))
    assert metrics["score"] == pytest.approx(fmean(values))
    parts = [rollout.slice(0, 3), rollout.slice(3)]
    again = evaluate(parts, {"score": [scores(values[:11]), scores(values[11:], 11)]}, rules)
    assert again == metrics
    order = pa.array(source.sample(range(20), 20))
    assert evaluate([rollout.take(order)], {"score": [scores(values).take(order)]}, rules) == pytest.approx(metrics)


def test_a_prompt_without_a_score_is_left_out_and_counted() -> None:
    rollout = responses([0, 0, 1, 1], [2, 2, 2, 2])
    rules = EvaluationRules((1,), {"right": 0.5})
    metrics = evaluate([rollout], {"score": [scores([1, 2, NAN, 9])], "right": [scores([NAN] * 4)]}, rules)
    assert (metrics["score"], metrics["unscored_fraction"]) == (1.5, 0.5)
    # Nothing is known, which is no zero; nor has one prompt a spread, nor the run's own score a threshold.
    assert {name for name in metrics if name.startswith("right/")} == {"right/unscored_fraction"}
    assert not {"score_error", "pass_at_1"} & metrics.keys()
    assert {"score", "score_error", "unscored_fraction"} == set(rules.metric_names("score"))
    assert "right/pass_at_1" in rules.metric_names("right")


def test_what_does_not_fit_is_refused() -> None:
    rollout = responses([0, 0], [2, 2])
    with pytest.raises(SchemaError, match="row 0 is sample 5, expected sample 0"):
        evaluate([rollout], {"score": [scores([1, 2], 5)]}, EvaluationRules((1,), {}))
    with pytest.raises(AlgorithmError, match="4 of 2 samples"):
        evaluate([rollout], {"score": [scores([1, 2])]}, EvaluationRules((4,), {"score": 1}))


def test_the_file_is_text_with_scores_for_people(tmp_path: Path) -> None:
    rollout = responses([0, 1], [3, 1], num_cut=1)
    columns = {"score": [scores([0.5, 1])], "right": [scores([NAN, 1])]}
    write_table(samples_table([rollout], columns, Letters(), {"iteration": 4}), tmp_path / "samples.arrow")
    frame = open_table(tmp_path / "samples.arrow").to_pandas()
    assert frame["prompt"].tolist() == ["bc", "bc"] and frame["response"].tolist() == ["dd", ""]
    assert frame["score"].tolist() == [0.5, 1] and frame["right"].isna().tolist() == [True, False]
    assert frame["finish_reason"].tolist() == ["length", "stop"] and frame["policy_version"].tolist() == [4, 4]


def test_several_rewards_are_combined_as_in_training_where_all_have_a_score() -> None:
    context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", 1, None, 0)
    total = TotalConfig.model_validate({"combine": {"kind": "linear", "weights": {"kind": 1.0, "short": 2.0}}})
    credit = CreditActor(context, OnlineConfig(name="dr_grpo"), 8, ("kind", "short"), total)
    column, num_rows = credit.combine(
        [responses([0, 0, 1], [2, 2, 2])], [scores([1, 2]), scores([NAN], 2), scores([0.5, -1, 0])]
    )
    assert num_rows == 3
    assert column.column("score").to_pylist() == pytest.approx([2.0, 0.0, NAN], nan_ok=True)
