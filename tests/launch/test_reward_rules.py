"""The rewards of a run: their forms, their names, what they are given, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from actors.rewards.config import AnyReward
from launch.check import check
from launch.check_rewards import check_rewards
from launch.config import OnlineRunConfig
from launch.configfile import load
from tests.launch.test_rules import EXAMPLES, refused

CHECKER = "rewards.right={kind: checker, check: {name: exact}}"
KEPT = "data.keep_columns=[answer]"


def online(name: str, *words: str) -> OnlineRunConfig:
    config = load(EXAMPLES / f"{name}.yaml", words)
    assert isinstance(config, OnlineRunConfig)
    return config


def test_one_reward_without_a_name_or_some_with_names() -> None:
    alone = online("ppo")
    assert list(alone.reward_roles) == ["reward"] and alone.reward_roles["reward"].kind == "model"
    several = online("rewards/combined", "rewards.polite={kind: function, path: 'a:b'}", "total.combine={kind: linear}")
    assert list(several.reward_roles) == ["preferred", "correct", "polite"]
    assert set(several.reward_roles) < set(several.placements())
    assert [where for where, _ in refused("ppo", "reward=null")] == ["rewards"]
    [(where, what)] = refused("ppo", CHECKER, KEPT)
    assert where == "reward" and "move it there, under a name: rewards.model" in what


@pytest.mark.parametrize("name", ["policy", "credit", "safety_prompts", "Right", "a-b"])
def test_names_that_a_reward_cannot_have(name: str) -> None:
    assert f"rewards.{name}" in [
        where for where, _ in refused("ppo", "reward=null", CHECKER.replace("right", name), KEPT)
    ]


@pytest.mark.parametrize(
    ("words", "where", "what"),
    [
        (["reward.kind=modle"], "reward.kind", "'modle' is none of model, function, checker"),
        (["rewards={a: {path: x}}"], "rewards.a.kind", "is missing; one of model, function"),
        (["reward={kind: function}"], "reward.path", "is missing; `package.module:name` or"),
        (["reward={kind: function, path: 'a:b', tiemout_s: 3}"], "reward.tiemout_s", "did you mean 'timeout_s'?"),
        (["reward={kind: checker, check: {name: exactly}}"], "reward.check.name", "'exactly' is none of exact"),
        (["total.combine={kind: gated, score: reward, gate: x, threshold: 1}"], "total", "there is no reward 'x'"),
        (["reward={kind: checker, check: {name: gsm8k}}"], "reward", "needs the column 'answer' of the prompts' rows"),
        (["total.shaping={a: {kind: overlong, margin_tokens: 99}}"], "total.shaping.a.margin_tokens", "at most 10"),
    ],
)
def test_mistakes_are_told_at_their_place(words: list[str], where: str, what: str) -> None:
    found = refused("methods/grpo", *words)
    assert any(at == where and what in said for at, said in found), found


def test_columns_are_for_prompts_alone() -> None:
    [(where, what)] = refused("sft", KEPT)
    assert where == "data.keep_columns" and "this run has none" in what


def test_a_baseline_is_scored_by_itself() -> None:
    running = "total.shaping={scale: {kind: normalise, by: running}}"
    assert refused("methods/grpo", running) == []
    [(where, what)] = refused("methods/remax", running)
    assert where == "total.shaping.scale.by" and "remax scores the response that it compares with by itself" in what


def test_a_judge_that_shares_a_gpu_leaves_room() -> None:
    [(where, _)] = refused("rewards/judge", "reward.gpus_per_rank=0.5", "reward.kv_cache_bytes=null")
    assert where == "reward.gpu_memory_fraction"


def test_functions_are_imported_and_asked_what_they_want(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
    facts: list[tuple[str, str]] = []

    def problems(*words: str) -> list[str]:
        facts.clear()
        return [str(problem) for problem in check_rewards(online("rewards/function", *words), {}, facts)]

    [missing] = problems()
    assert missing.startswith("reward: ") and "no file" in missing and str(tmp_path) in missing
    (tmp_path / "mine.py").write_text("async def score(response, answer): return 1.0")
    assert problems("reward.path=mine.py:score") == []
    assert facts == [("reward", f"async function {tmp_path}/mine.py:score of response, answer")]
    [unkept] = problems("reward.path=mine.py:score", "data.keep_columns=[]")
    assert "asks for 'answer'" in unkept and "add it to data.keep_columns" in unkept
    [wrong] = problems("reward={kind: checker, check: {name: json_schema, json_schema: {type: nothing}}}")
    assert wrong.startswith("reward: ")


@pytest.mark.parametrize(
    ("reward", "longest"),
    [
        ("{kind: checker, check: {name: exact}, timeout_s: 700}", "2,101.5"),  # and waits of 0.5 and 1 s
        ("{kind: checker, check: {name: exact}, timeout_s: 500}", ""),
        ("{kind: code, timeout_s: 1700}", "1,700"),  # a test that takes too long is a score: it has one try
        ("{kind: http, endpoints: ['http://a'], timeout_s: 600, num_retries: 0}", "2,403.5"),
        ("{kind: http, endpoints: ['http://a'], timeout_s: 300, num_retries: 0}", ""),
    ],
)
def test_a_sample_whose_tries_outlast_a_call_is_named(reward: str, longest: str) -> None:
    facts: list[tuple[str, str]] = []
    words = [f"reward={reward}", "data.keep_columns=[answer, tests]"]
    assert not list(check_rewards(online("rewards/function", *words), {}, facts))
    [(_, said)] = facts
    assert (f"may take {longest} s, and what is not done 1,620 s after" in said) if longest else "may take" not in said


KINDS = {
    "checker": ["checker"],
    "code": ["code"],
    "combined": ["model", "checker"],
    "function": ["function"],
    "http": ["http"],
    "judge": ["judge"],
}


def test_there_is_an_example_for_every_kind() -> None:
    assert {path.stem for path in (EXAMPLES / "rewards").glob("*.yaml")} == set(KINDS)
    for name, kinds in KINDS.items():
        assert [reward.kind for reward in online(f"rewards/{name}").reward_roles.values()] == kinds
    every = {option.model_fields["kind"].default for option in get_args(get_args(AnyReward)[0])}
    assert every == {kind for kinds in KINDS.values() for kind in kinds}


@pytest.mark.parametrize("name", KINDS)
def test_the_examples_can_run(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(home))
    (home / "examples").symlink_to(EXAMPLES)
    (home / "code.jsonl").write_text('{"prompt": "list 2 1 sorted :", "tests": "assert True"}\n')
    words = ["data.train=code.jsonl"] if name == "code" else []  # it says that the demo's rows have no tests
    report = check(online(f"rewards/{name}", *words))
    assert report.ok, report.problems


def test_an_evaluations_checkers_are_looked_at_as_rewards_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("def score(response, answer, level): return 1.0")
    words = [
        "data.heldout_fraction=0.1",
        "evaluation.checkers.form={kind: checker, check: {name: json_schema, json_schema: {type: nothing}}}",
        "evaluation.checkers.own={kind: function, path: 'mine.py:score'}",
        "evaluation.checkers.gone={kind: function, path: 'nowhere.py:score'}",
        "evaluation.checkers.right={kind: checker, check: {name: exact}}",
        "reward={kind: checker, check: {name: exact}}",
    ]
    facts: list[tuple[str, str]] = []
    form, own, gone = map(str, check_rewards(online("rewards/function", *words), {}, facts))
    assert form.startswith("evaluation.checkers.form: json_schema is not a JSON schema: 'nothing'")
    assert own == (
        f"evaluation.checkers.own: {tmp_path}/mine.py:score asks for 'level'; it can be given prompt, response, "
        "finished, answer: add it to data.keep_columns"
    )
    assert gone.startswith(f"evaluation.checkers.gone: {tmp_path}/nowhere.py:score: ") and "no file" in gone
    assert facts == [("reward", "checker exact"), ("evaluation.checkers.right", "checker exact")]
