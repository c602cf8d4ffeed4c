"""Credit of episodes: where rewards stand, and what algorithms make of it; by hand and against slow loops."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.credit import CreditActor, CreditReport
from actors.environment_credit import environment_scores
from actors.rewards.combination_config import TotalConfig
from algorithms.config import OnlineConfig
from algorithms.group_advantages import grpo, turn_grpo
from cluster.context import RankContext
from experience.schema import ROLLOUT, SCORES, VALUES, make_batch
from tests.algorithms import slow

Episode = list[tuple[int, float]]  # tokens and reward of each turn
BY_HAND: list[Episode] = [[(2, 1.0), (1, 4.0)], [(1, -2.0)]]


def per_token(episode: Episode) -> list[float]:
    """A turn's reward on its last token."""
    return [number for length, reward in episode for number in [*[0.0] * (length - 1), reward]]


def rollout(episodes: list[Episode], tokens: list[list[float]] | None = None) -> pa.RecordBatch:
    """Rewards of single tokens where ``tokens`` has them.

    Two tokens of prompt, one of the environment's between turns; neighbours answer the same prompt.
    """
    starts, ends = [], []
    for episode in episodes:
        places = [2]
        for length, _ in episode:
            places.append(places[-1] + length + 1)
        starts.append(places[:-1])
        ends.append([place - 1 for place in places[1:]])
    drawn = [sum(length for length, _ in episode) for episode in episodes]
    columns = {
        "sample_id": list(range(len(episodes))),
        "prompt_id": [row // 2 for row in range(len(episodes))],
        "tokens": [[5] * last[-1] for last in ends],
        "num_prompt_tokens": [2] * len(episodes),
        "turn_starts": starts,
        "turn_ends": ends,
        "environment_rewards": [per_token(episode) for episode in episodes] if tokens is None else tokens,
        "rollout_logprobs": [[-1.0] * length for length in drawn],
        "policy_versions": [[0] * length for length in drawn],
        "finish_reason": ["stop"] * len(episodes),
    }
    return make_batch(ROLLOUT, columns)


def assign(
    episodes: list[Episode],
    settings: dict[str, Any],
    values: list[list[float]] | None = None,
    tokens: list[list[float]] | None = None,
    **total: Any,
) -> tuple[list[list[float]], CreditReport]:
    context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", torch.get_num_threads(), None, 0)
    rows = rollout(episodes, tokens)
    names = ("environment", *(["other"] if total else []))
    actor = CreditActor(
        context, OnlineConfig.model_validate(settings), 64, names, TotalConfig.model_validate(total)
    )
    scores = [actor.environment_scores([rows])[0]]
    ids = rows.column("sample_id")
    if total:
        scores.append(make_batch(SCORES, {"sample_id": ids, "score": [10.0] * len(episodes)}))
    given = [] if values is None else [make_batch(VALUES, {"sample_id": ids, "values": values})]
    credit, report = actor.assign([rows], [], given, scores, [], [], 0.0, 0, None)
    return credit.column("advantages").to_pylist(), report


def test_scores_are_sums_of_turns() -> None:
    scores = environment_scores([rollout(BY_HAND), rollout(BY_HAND).slice(1)])
    assert scores.column("score").to_pylist() == [5.0, -2.0, -2.0]


def test_rewards_stand_on_the_last_tokens_of_turns_by_hand() -> None:
    """Values 0, gamma 0.5, lambda 1: what comes later is halved with every token."""
    settings = {"name": "ppo", "gamma": 0.5, "gae_lambda": 1.0, "whiten_advantages": False, "kl": {"coefficient": 0}}
    found, report = assign(BY_HAND, settings, [[0.0] * 3, [0.0]])
    assert found == [[0.5 + 4 / 4, 1 + 4 / 2, 4.0], [-2.0]]
    assert report.metrics["experience/score"] == 1.5 and report.metrics["experience/turns"] == 1.5
    # Another reward of 10 stands on the last token of the sample; the environment counts double.
    weights = {"kind": "linear", "weights": {"environment": 2.0, "other": 1.0}}
    found, _ = assign(BY_HAND, settings, [[0.0] * 3, [0.0]], combine=weights)
    assert found == [[1 + (8 + 10) / 4, 2 + (8 + 10) / 2, 18.0], [6.0]]


def test_rewards_of_tokens_by_hand() -> None:
    """As above, but the first turn earns 3 with its first token and loses 2 with its second."""
    settings = {"name": "ppo", "gamma": 0.5, "gae_lambda": 1.0, "whiten_advantages": False, "kl": {"coefficient": 0}}
    tokens = [[3.0, -2.0, 4.0], [-2.0]]
    found, report = assign(BY_HAND, settings, [[0.0] * 3, [0.0]], tokens)
    assert found == [[3 - 2 / 2 + 4 / 4, -2 + 4 / 2, 4.0], [-2.0]]
    assert report.metrics["experience/score"] == 1.5
    # Divided by 4 with the score, and 10 more, less the mean of 1, on the last token.
    found, _ = assign(
        BY_HAND, settings, [[0.0] * 3, [0.0]], tokens, shaping={"scale": {"kind": "normalise", "mean": 1.0, "std": 4.0}}
    )
    assert found == [[0.75 - 0.25 + 3.25 / 4, -0.5 + 3.25 / 2, 1.0 + 2.25], [-0.5 + 2.25]]


def test_a_turn_has_earned_what_its_tokens_have() -> None:
    settings = {"name": "turn_grpo", "gamma": 0.7, "kl": {"coefficient": 0}}
    tokens = [[3.0, -2.0, 4.0], [-2.0]]
    assert assign(BY_HAND, settings, tokens=tokens)[0] == assign(BY_HAND, settings)[0]


@pytest.mark.parametrize(
    ("shaping", "on_turns"),
    [
        ({"scale": {"kind": "normalise", "mean": 1.0, "std": 4.0}}, [[0.25, 1.0 + 2.25], [-0.5 + 2.25]]),
        # Of 15 and 8 over the run so far: mean 11.5, deviation 3.5.
        ({"scale": {"kind": "normalise", "by": "running"}}, [[1 / 3.5, 1 - 1 / 3.5], [-1.0]]),
        (
            {"own": {"kind": "normalise", "reward": "environment", "std": 2.0}, "eos": {"kind": "clip", "high": 99}},
            [[0.5, 2.0 + 10.0], [-1.0 + 10.0]],
        ),
        # The first is over the bound: a number of its own stands there, and no turn has a part in it.
        ({"bounds": {"kind": "clip", "high": 12.0}}, [[0.0, 12.0], [-2.0 + 10.0]]),
        ({"bounds": {"kind": "clip", "high": 2.0, "reward": "environment"}}, [[0.0, 2.0 + 10.0], [-2.0 + 10.0]]),
        ({"long": {"kind": "length", "penalty_per_token": 0.5}}, [[1.0, 4.0 + 10.0 - 1.5], [-2.0 + 10.0 - 0.5]]),
    ],
    ids=["constants", "running", "of the environment", "clipped", "clipped alone", "length"],
)
def test_a_turns_reward_is_shaped_as_the_score_is(shaping: dict[str, Any], on_turns: list[list[float]]) -> None:
    """Another reward of 10 stands on the sample's last token. Sums over a sample are the shaped score."""
    settings = {"name": "ppo", "gae_lambda": 1.0, "whiten_advantages": False, "kl": {"coefficient": 0}}
    found, report = assign(BY_HAND, settings, [[0.0] * 3, [0.0]], shaping=shaping)
    (first, last), (only,) = on_turns
    assert [number for row in found for number in row] == pytest.approx([first + last, first + last, last, only])
    assert report.metrics["experience/shaped_score"] == pytest.approx((first + last + only) / 2)


def test_turns_have_no_part_in_what_is_no_sum() -> None:
    settings = {"name": "ppo", "gae_lambda": 1.0, "whiten_advantages": False, "kl": {"coefficient": 0}}
    rule = {"kind": "gated", "score": "environment", "gate": "other", "threshold": 0.0}
    assert assign(BY_HAND, settings, [[0.0] * 3, [0.0]], combine=rule)[0] == [[5.0] * 3, [-2.0]]


def random_episodes(seed: int, num: int = 6) -> list[Episode]:
    source = random.Random(seed)
    return [[(source.randint(1, 4), source.uniform(-1, 1)) for _ in range(source.randint(1, 4))] for _ in range(num)]


def test_generalised_advantages_equal_slow_code() -> None:
    episodes, source = random_episodes(0), random.Random(1)
    values = [[source.uniform(-1, 1) for length, _ in episode for _ in range(length)] for episode in episodes]
    settings = {"name": "ppo", "gamma": 0.9, "gae_lambda": 0.8, "whiten_advantages": False, "kl": {"coefficient": 0}}
    found, _ = assign(episodes, settings, values)
    for episode, row, value in zip(episodes, found, values, strict=True):
        rewards = [0.0] * len(row)
        at = 0
        for length, reward in episode:
            at += length
            rewards[at - 1] = reward
        assert row == pytest.approx(slow.gae(rewards, value, 0.9, 0.8)[0], abs=1e-5)


def slow_turn_grpo(episodes: list[Episode], gamma: float) -> list[list[float]]:
    returns = []
    for episode in episodes:
        later, row = 0.0, []
        for _, reward in reversed(episode):
            later = reward + gamma * later
            row.append(later)
        returns.append(row[::-1])
    found = []
    for place, episode in enumerate(episodes):
        advantages = []
        for turn, (length, _) in enumerate(episode):
            group = [returns[other][turn] for other in range(len(episodes))
                     if other // 2 == place // 2 and turn < len(returns[other])]  # fmt: skip
            mean = sum(group) / len(group)
            spread = (sum((one - mean) ** 2 for one in group) / max(1, len(group) - 1)) ** 0.5
            advantages += [(returns[place][turn] - mean) / (spread + 1e-6)] * length
        found.append(advantages)
    return found


def test_turn_by_turn_equals_slow_code() -> None:
    episodes = random_episodes(3, 8)
    settings = {"name": "turn_grpo", "gamma": 0.7, "kl": {"coefficient": 0}}
    found, _ = assign(episodes, settings)
    for row, wanted in zip(found, slow_turn_grpo(episodes, 0.7), strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


def test_with_one_turn_it_is_grpo() -> None:
    scores, ids = torch.randn(6, dtype=torch.float64), torch.tensor([3, 3, 3, 1, 1, 1])
    offsets = torch.arange(7)
    assert torch.equal(turn_grpo(scores, offsets, offsets, ids, gamma=0.5), grpo(scores, ids))
    empty = torch.zeros(0, dtype=torch.float64)
    none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert len(turn_grpo(empty, zero, zero, none, gamma=1.0)) == 0
