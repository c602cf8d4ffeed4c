"""What would change nothing, or fail after the first iteration, is refused before a run."""

from __future__ import annotations

import pytest

from actors.rewards.combination_config import TotalConfig
from algorithms.errors import AlgorithmError
from algorithms.kl import KLController
from launch.config import OnlineRunConfig
from launch.configfile import load
from tests.launch.test_rules import EXAMPLES, refused


def test_a_kl_horizon_is_long_enough_for_the_batch() -> None:
    """At the shortest that is taken the controller can lower the coefficient, and at one less it cannot."""
    [(where, what)] = refused("ppo", "algorithm.kl.target=6", "algorithm.kl.horizon_samples=51")
    assert where == "algorithm.kl.horizon_samples"
    assert what.startswith("51 with online.batch_size = 256: one batch")
    assert what.endswith("; 52 or more, usually 10000")
    assert refused("ppo", "algorithm.kl.target=6", "algorithm.kl.horizon_samples=52") == []
    assert KLController(0.1, target=6.0, horizon_samples=52).updated(0.0, 256).coefficient > 0
    with pytest.raises(AlgorithmError, match="the horizon must be above"):
        KLController(0.1, target=6.0, horizon_samples=51).updated(0.0, 256)
    batch = ("online.batch_size=255", "algorithm.num_minibatches=1", "algorithm.kl.target=6")
    [(_, what)] = refused("ppo", *batch, "algorithm.kl.horizon_samples=51")  # 5 x 51: exactly to 0
    assert what.endswith("; 52 or more, usually 10000")


def test_a_kl_horizon_is_of_a_coefficient_that_moves() -> None:
    [(where, what)] = refused("ppo", "algorithm.kl.horizon_samples=50")
    assert where == "algorithm.kl.horizon_samples" and "algorithm.kl.target is none" in what
    assert refused("ppo", "algorithm.kl.horizon_samples=10000") == []  # as a resolved configuration has it


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_adapters_that_learn_from_samples_drop_nothing_out(role: str, method: str) -> None:
    [(where, what)] = refused("ppo", f"{role}.tuning={{method: {method}, lora: {{dropout: 0.3}}}}")
    assert where == f"{role}.tuning.lora.dropout"
    assert what.startswith("0.3 drops in updates and not in scoring") and what.endswith("; 0")
    assert refused("ppo", f"{role}.tuning={{method: {method}}}") == []


def test_learners_may_drop_out() -> None:
    for name in ("methods/sft_lora", "methods/dpo_qlora"):
        assert refused(name, "learner.tuning.lora.dropout=0.3") == []


@pytest.mark.parametrize(
    ("step", "where", "what"),
    [
        ("{kind: overlong, margin_tokens: 4, max_tokens: 20480}", "max_tokens", "above 20476 tokens, and no response"),
        ("{kind: overlong, margin_tokens: 4, max_tokens: 14}", "max_tokens", "at most 13, or leave it out"),
        ("{kind: overlong, margin_tokens: 4, max_tokens: 13}", "", ""),
        ("{kind: length, penalty_per_token: 1, free_tokens: 10}", "free_tokens", "no response has more than 10"),
        ("{kind: length, penalty_per_token: 1, free_tokens: 9}", "", ""),
        ("{kind: repetition, ngram: 10}", "ngram", "of 11 tokens or more, and the longest response has 10"),
        ("{kind: repetition, ngram: 9}", "", ""),
    ],
)
def test_penalties_of_length_begin_within_a_response(step: str, where: str, what: str) -> None:
    """Responses of at most 10 tokens."""
    found = refused("methods/grpo", f"total.shaping={{step: {step}}}")
    assert [at for at, _ in found] == ([f"total.shaping.step.{where}"] if where else [])
    assert all(what in said for _, said in found)


def test_the_longest_response_of_an_episode_is_all_that_is_drawn_in_its_turns() -> None:
    episodes = load(EXAMPLES / "environments" / "guessing_grpo.yaml", ())
    assert isinstance(episodes, OnlineRunConfig)
    drawn = episodes.rollout.max_drawn_tokens
    assert drawn > episodes.rollout.sampling.max_response_tokens
    for free, places in ((drawn - 1, []), (drawn, ["total.shaping.price.free_tokens"])):
        price = f"total.shaping={{price: {{kind: length, penalty_per_token: 1, free_tokens: {free}}}}}"
        assert [where for where, _ in refused("environments/guessing_grpo", price)] == places


@pytest.mark.parametrize(
    ("combine", "shaping", "why"),
    [
        ({"kind": "piecewise", "helpfulness": "a", "safety": "a"}, {}, "helpfulness and safety are both 'a'"),
        ({"kind": "linear", "weights": {"a": 0}}, {}, "all weights are 0"),
        ({"kind": "linear", "weights": {"a": 0}}, {"scale": {"kind": "clip"}}, "all weights are 0"),
        ({"kind": "linear", "weights": {"a": 0}}, {"price": {"kind": "length", "penalty_per_token": 1}}, None),
        ({"kind": "linear", "weights": {"a": -1}}, {}, None),
        ({"kind": "linear"}, {}, None),
    ],
)
def test_a_total_depends_on_its_rewards(
    combine: dict[str, object], shaping: dict[str, object], why: str | None
) -> None:
    reason = TotalConfig.model_validate({"combine": combine, "shaping": shaping}).why_not(["a"])
    assert reason is None if why is None else why in (reason or "")
