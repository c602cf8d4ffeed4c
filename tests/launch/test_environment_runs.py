"""Runs with an environment: the driver over stand-ins, and rules of the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.credit import CreditActor
from actors.rollout import RolloutInfo
from cluster.context import RankContext
from experience.schema import make_batch
from launch.config import OnlineRunConfig
from launch.configfile import load
from launch.errors import ConfigError, RewardsDown
from launch.paths import resolve_rollout
from launch.roles import online_roles
from tests.launch.test_online_driver import NUM_PROMPTS, ROOT, Engine, Group, Run, nothing_travels

__all__ = ["nothing_travels"]

ENVIRONMENT = "rollout.environment={path: a.b:C, max_turns: 2, max_tokens: 40}"
EPISODES = ("reward=null", ENVIRONMENT, "rollout.max_model_tokens=64")


class Episodes(Engine):
    """Two turns of one token each, with the sample's place as the last reward; those of some prompts fail."""

    fails = staticmethod(lambda prompt: False)

    def generate(self, prompts: pa.RecordBatch, rows: list[int], greedy: bool = False) -> Any:
        batch, info = super().generate(prompts, rows, greedy)
        failed = {prompt: "environment raised" for prompt in info.prompt_ids if self.fails(prompt)}
        kept = [row for row in batch.to_pylist() if row["prompt_id"] not in failed]
        columns = {name: [row[name] for row in kept] for name in batch.schema.names}
        columns["tokens"] = [[*row["tokens"][:3], 7, row["tokens"][3]] for row in kept]
        columns["turn_starts"] = [[2, 4] for _ in kept]
        columns["turn_ends"] = [[3, 5] for _ in kept]
        columns["environment_rewards"] = [[0.0, float(row["sample_id"] % 2)] for row in kept]
        left = tuple(prompt for prompt in info.prompt_ids if prompt not in failed)
        told: RolloutInfo = replace(
            info, prompt_ids=left, num_samples=len(kept), num_tokens=2 * len(kept), dropped=failed
        )
        return make_batch(batch.schema, columns), told


def episodes(tmp_path: Path, fails: Any) -> Run:
    run = Run(tmp_path, "dr_grpo", lambda prompt: False, *EPISODES, max_failed_redraws=3)
    config = run.config
    context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", 1, None, 0)
    credit = CreditActor(context, config.algorithm, config.rollout.max_drawn_tokens, config.score_names, config.total)
    run.engine = Episodes(2)
    run.engine.fails = fails
    run.roles = replace(run.roles, rollout=Group(run.engine), credit=Group(credit))  # type: ignore[arg-type]
    return run


async def test_prompts_whose_episodes_fail_are_replaced(tmp_path: Path) -> None:
    run = episodes(tmp_path, lambda prompt: prompt % 3 == 0)
    await run.drive()
    assert [prompt for prompts in run.policy.prompts for prompt in prompts] == [p for p in range(18) if p % 3]
    assert [len(prompts) for prompts in run.policy.prompts] == [NUM_PROMPTS] * 3
    assert Counter(a for batch in run.policy.advantages for a in batch) == {0.5: 12, -0.5: 12}
    balance = run.state.ledger.balance()
    assert balance.balances and balance.dropped["environment raised"] == 6
    assert [row["experience/score"] for row in run.recorder.rows] == [0.5] * 3
    assert [row["experience/turns"] for row in run.recorder.rows] == [2.0] * 3


async def test_an_environment_that_always_fails_ends_the_run(tmp_path: Path) -> None:
    run = episodes(tmp_path, lambda prompt: True)
    with pytest.raises(RewardsDown, match=r"dropped \(environment raised\).*the engine for an environment"):
        await run.drive()


def config(*words: str) -> OnlineRunConfig:
    found = load(ROOT / "examples" / "methods" / "dr_grpo.yaml", [*words])
    assert isinstance(found, OnlineRunConfig)
    return found


def test_the_environment_is_a_reward() -> None:
    found = config(*EPISODES)
    assert found.score_names == ("environment",) and found.reward_roles == {}
    assert config(ENVIRONMENT, "rollout.max_model_tokens=64").score_names == ("reward", "environment")
    assert found.rollout.max_new_tokens == 40 and found.rollout.max_drawn_tokens == 20


@pytest.mark.parametrize(
    "words, message",
    [
        (["rollout.max_model_tokens=50"], "data.max_tokens 16 . rollout.environment.max_tokens 40 = 56"),
        (["policy.max_tokens_per_pack=50"], "rollout.environment.max_tokens 40 = 56"),
        (["rollout.environment.max_tokens=10"], "no more than one turn, rollout.sampling.max_response_tokens = 10"),
        (["algorithm={name: remax}"], "remax compares with one more response to the prompt"),
        (["total={combine: {kind: linear, weights: {other: 1}}}"], "there is no reward 'other'"),
    ],
)
def test_rules(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*EPISODES, *words)


def test_what_an_environment_gives_can_be_what_is_the_best() -> None:
    measured = ("data.heldout=a.jsonl", "evaluation={best_by: {metric: environment/score}}")
    assert config(*EPISODES, *measured).evaluation is not None
    with pytest.raises(ConfigError, match=r"environment/score is not measured"):
        config(*measured)


async def test_a_policys_longest_sample_is_all_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which `normalise: constant` divides; the engines' longest response stays that of one turn."""
    given: dict[str, tuple[Any, ...]] = {}

    @asynccontextmanager
    async def starter(*_: object) -> AsyncIterator[Any]:
        async def start(role_class: object, role: str, args: tuple[Any, ...]) -> Any:
            given[role] = args

        yield start

    monkeypatch.setattr("launch.roles._starter", starter)
    for words, longest in ((EPISODES, 20), ((), 10)):
        async with online_roles(config(*words), tmp_path):
            pass
        _, algorithm, sampling, *_ = given["policy"]
        assert algorithm.normalise == "constant" and sampling.max_response_tokens == longest
        assert given["rollout"][0].sampling.max_response_tokens == 10


def test_a_path_that_names_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"write package\.module:Class or path/to/file\.py:Class"):
        config("rollout.environment={path: games.py, max_turns: 2, max_tokens: 40}")
    monkeypatch.setenv("TROUPE_HOME", "/home/of/runs")
    words = (EPISODES[0], "rollout.environment={path: my/games.py:C, max_turns: 2, max_tokens: 40}")
    found = resolve_rollout(config(*words, "rollout.max_model_tokens=64").rollout)
    assert found.environment is not None and found.environment.path == "/home/of/runs/my/games.py:C"
