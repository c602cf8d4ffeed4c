"""Several rewards made one: against plain Python, sample by sample, and the configuration that says how."""

from __future__ import annotations

import doctest
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from actors.rewards import combination
from actors.rewards.combination import Responses, Total, total_scores
from actors.rewards.combination_config import TotalConfig
from algorithms.errors import AlgorithmError
from algorithms.moments import RunningMoments

N = 40


def random_case(seed: int = 0) -> tuple[dict[str, torch.Tensor], Responses]:
    source = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(N, generator=source, dtype=torch.float64) * 4 for name in ("help", "safe")}
    lengths = torch.randint(1, 12, (N,), generator=source)
    tokens = [torch.randint(0, 3, (length,), generator=source).tolist() for length in lengths.tolist()]
    finished, tags = (torch.rand(N, generator=source) < 0.6 for _ in range(2))
    return scores, Responses(finished, tokens, lengths, 10, tags)


def slow(config: dict[str, Any], scores: dict[str, torch.Tensor], responses: Responses) -> list[float]:
    """The total, in plain Python: help and safe, piecewise, whitened, then all kinds of shaping in this order."""
    found = []
    for at in range(N):
        helpful, safe = max(-3.0, min(3.0, scores["help"][at].item())), scores["safe"][at].item()
        assert responses.safety_prompts_N is not None
        unsafe = 1 / (1 + math.exp(-safe)) < 0.15
        found.append(safe if bool(responses.safety_prompts_N[at]) or unsafe else helpful)
    mean = sum(found) / N
    std = math.sqrt(sum((one - mean) ** 2 for one in found) / N + 1e-8)
    found = [(one - mean) / std for one in found]
    for at in range(N):
        length, finished, tokens = len(responses.tokens[at]), bool(responses.finished_N[at]), responses.tokens[at]
        one = (found[at] - 0.5) / 2.0
        one = one if finished else -1.0
        one -= 0.25 * (not finished)
        one -= 0.01 * max(0, length - 3)
        one -= 0.5 * min(1.0, max(0.0, (length - 6) / 4))
        pairs = list(pairwise(tokens))
        one -= 2.0 * (1 - len(set(pairs)) / len(pairs)) if pairs else 0.0
        found[at] = one
    return found


EVERYTHING: dict[str, Any] = {
    "combine": {"kind": "piecewise", "helpfulness": "help", "safety": "safe", "tag_column": "tag"},
    "shaping": {
        "clipped": {"kind": "clip", "low": -3, "high": 3, "reward": "help"},
        "scaled": {"kind": "normalise", "mean": 0.5, "std": 2},
        "cut": {"kind": "truncation", "score": -1},
        "eos": {"kind": "missing_eos", "penalty": 0.25},
        "long": {"kind": "length", "penalty_per_token": 0.01, "free_tokens": 3},
        "overlong": {"kind": "overlong", "margin_tokens": 4, "penalty": 0.5},
        "again": {"kind": "repetition", "ngram": 2, "penalty": 2},
    },
}


def adds_up(total: Total) -> None:
    behind = sum((total.terms[name] for name in total.behind), start=total.terms["combined"])
    torch.testing.assert_close(behind, total.scores_N)


@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once_is_as_in_plain_python(seed: int) -> None:
    scores, responses = random_case(seed)
    total = total_scores(TotalConfig.model_validate(EVERYTHING), scores, responses)
    expected = torch.tensor(slow(EVERYTHING, scores, responses), dtype=torch.float64)
    torch.testing.assert_close(total.scores_N, expected, rtol=1e-6, atol=1e-6)
    adds_up(total)
    names = ["help", "safe", "clipped", "combined", "whitened", "scaled", "cut", "eos", "long", "overlong", "again"]
    assert list(total.terms) == names and total.behind == tuple(names[4:])
    metrics = total.metrics()
    assert set(metrics) == {*names, "help_std", "safe_std", "clipped_std", "total", "total_std"}
    assert metrics["again"] == pytest.approx(total.terms["again"].mean().item())
    torch.testing.assert_close(scores["help"], random_case(seed)[0]["help"])


def test_the_order_of_samples_does_not_matter() -> None:
    scores, responses = random_case()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert responses.safety_prompts_N is not None
    turned = Responses(
        responses.finished_N[order],
        [responses.tokens[at] for at in order.tolist()],
        responses.lengths_N[order],
        responses.max_tokens,
        responses.safety_prompts_N[order],
    )
    config = TotalConfig.model_validate(EVERYTHING)
    one = total_scores(config, scores, responses).scores_N[order]
    other = total_scores(config, {name: score[order] for name, score in scores.items()}, turned).scores_N
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_linear_and_gated() -> None:
    scores, responses = random_case()
    assert torch.equal(total_scores(TotalConfig(), scores, responses).scores_N, scores["help"] + scores["safe"])
    weighted = TotalConfig.model_validate({"combine": {"kind": "linear", "weights": {"help": 1, "safe": -0.5}}})
    total = total_scores(weighted, scores, responses)
    torch.testing.assert_close(total.scores_N, scores["help"] - 0.5 * scores["safe"])
    assert total.behind == ()
    rule = {"kind": "gated", "score": "help", "gate": "safe", "threshold": 1.0, "replacement": -9.0}
    total = total_scores(TotalConfig.model_validate({"combine": rule}), scores, responses)
    expected = [h if s >= 1 else -9.0 for h, s in zip(scores["help"].tolist(), scores["safe"].tolist(), strict=True)]
    assert total.scores_N.tolist() == expected


def test_running_moments_go_on_from_batch_to_batch() -> None:
    config = TotalConfig.model_validate({"shaping": {"scaled": {"kind": "normalise", "by": "running"}}})
    assert config.running == ("scaled",)
    scores, responses = random_case()
    first = total_scores(config, scores, responses)
    assert first.scores_N.mean().abs() < 1e-9 and abs(first.scores_N.std(correction=0).item() - 1) < 1e-9
    second = total_scores(config, scores, responses, first.moments)
    assert second.moments["scaled"].count == 2 * N
    torch.testing.assert_close(second.scores_N, first.scores_N)  # the same scores again have the same moments
    assert first.moments == {"scaled": RunningMoments().updated((scores["help"] + scores["safe"]).tolist())}
    adds_up(second)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"combine": {"kind": "linear", "weights": {"help": 1}}}, "gives safe no weight"),
        ({"combine": {"kind": "linear", "weights": {"help": 1, "safe": 1, "x": 1}}}, "no reward 'x'; .* help, safe"),
        ({"combine": {"kind": "piecewise", "helpfulness": "help", "safety": "y"}}, "no reward 'y'"),
        ({"shaping": {"c": {"kind": "clip", "reward": "z"}}}, "no reward 'z'"),
        ({"shaping": {"total": {"kind": "clip"}}}, "'total' cannot be the name"),
        ({"shaping": {"help": {"kind": "clip"}}}, "'help' is the name of a reward and of a shaping"),
    ],
)
def test_a_configuration_of_other_rewards_is_refused(config: dict[str, Any], reason: str) -> None:
    scores, responses = random_case()
    with pytest.raises(AlgorithmError, match=reason):
        total_scores(TotalConfig.model_validate(config), scores, responses)


@pytest.mark.parametrize(
    "shaping", [{"kind": "clip", "low": 2, "high": 1}, {"kind": "normalise", "by": "running", "std": 2}, {"kind": "no"}]
)
def test_a_shaping_that_makes_no_sense_is_refused(shaping: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TotalConfig.model_validate({"shaping": {"it": shaping}})


def test_prompts_without_tags_are_refused_where_tags_decide() -> None:
    scores, responses = random_case()
    bare = Responses(responses.finished_N, responses.tokens, responses.lengths_N, 10)
    with pytest.raises(AlgorithmError, match="each prompt's tag, from the column tag"):
        total_scores(TotalConfig.model_validate({"combine": EVERYTHING["combine"]}), scores, bare)


def test_the_examples_of_the_docstrings() -> None:
    assert doctest.testmod(combination, extraglobs={"torch": torch}).failed == 0
