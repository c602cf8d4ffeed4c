"""A judge on a real engine, against its own model in Transformers; and how its words become a number."""

from __future__ import annotations

import asyncio
import doctest
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from actors.config import ModelConfig
from actors.errors import EngineDead, RewardError, RolloutError
from actors.rewards import judge
from actors.rewards.config import JudgeRewardConfig, LabelsConfig
from actors.rewards.face import Reason, RewardFailure, RewardSample
from actors.rewards.judge import JudgeReward, expected_value, label_tokens, parsed, question
from actors.rewards.retries import score_with_retries
from tests.actors import rollouts, tiny_models
from tests.actors.ranks import context

QUESTION = [10, 11, 12]
TEMPLATE = "P {prompt} R {response} G {gold}? "


def config(folder: Path | str = "x", **changes: Any) -> JudgeRewardConfig:
    given = {"model": ModelConfig(path=str(folder), dtype="float32"), "template": TEMPLATE, "kv_cache_bytes": 32 << 20}
    return JudgeRewardConfig(**(given | changes))


def sample(response: str, gold: object = 7) -> RewardSample:
    return RewardSample("ASK", response, True, {"gold": gold})  # type: ignore[dict-item]


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_surroundings")
@pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS)
@pytest.mark.timeout(240)
async def test_a_judges_labels_are_the_probabilities_of_its_model(tmp_path: Path) -> None:
    folder = rollouts.write_model(tmp_path / "judge", tied=False)
    labels = LabelsConfig(values={"Y": 1.0, "N": -1.0, "M": 0.25}, least_mass=0.0)
    reward = JudgeReward(config(folder, labels=labels), context(role="judge"))
    try:
        samples = [sample("A"), sample("BB"), sample("A", gold="G")]
        answers = await reward.score([*samples, sample("X" * 400)])
        written = await reward._engine.answer(QUESTION, max_tokens=5, temperature=0.0)
    finally:
        await reward.close()
    # Transformers 5 replaces any tokenizer's rules by Qwen's own beside a Qwen model.
    tokenizer, network = transformers.AutoTokenizer.from_pretrained(folder), rollouts.network(folder)
    for one, answer in zip(samples, answers, strict=False):
        ids = tokenizer(f"P ASK R {one.response} G {one.columns['gold']}? ")["input_ids"]
        with torch.no_grad():
            probabilities = network(torch.tensor([ids])).logits[0, -1].softmax(-1)
        shares = [probabilities[tokenizer(label)["input_ids"][0]].item() for label in "YNM"]
        assert answer == pytest.approx((shares[0] - shares[1] + 0.25 * shares[2]) / sum(shares), abs=1e-4)
    ids = list(QUESTION)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    assert written.text == tokenizer.decode(ids[len(QUESTION) :], skip_special_tokens=True)
    too_long = answers[-1]
    assert isinstance(too_long, RewardFailure) and too_long.reason is Reason.REFUSED


class Engine:
    """Does what it is asked to in capitals."""

    def __init__(self, *_: object, **__: object) -> None: ...

    async def answer(self, question: list[int], *, attempt: int, **_: object) -> Any:
        said = tiny_models.tokenizer().decode(question)
        if "QUEUE" in said:
            await asyncio.sleep(0.1)
        if "VAGUE" in said:
            return SimpleNamespace(text=str(attempt) if attempt else "MAYBE")
        if "SLOW" in said:
            await asyncio.sleep(30)
        if "LONG" in said:
            raise RolloutError("vLLM does not take the question")
        if "DIE" in said:
            raise EngineDead("its process died")
        return SimpleNamespace(text="1e999" if "HUGE" in said else "NOTHING" if "MUTE" in said else "7")


@pytest.mark.usefixtures("vllm_surroundings")
async def test_every_fault_of_the_engine_is_a_failure_but_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "actors.vllm_engine.judging", SimpleNamespace(JudgeEngine=Engine))
    tiny_models.tokenizer().save_pretrained(tmp_path)
    reward = JudgeReward(config(tmp_path, pattern="(.+)", timeout_s=0.2), context(role="judge"))
    answers = await reward.score([sample(word) for word in ("FINE", "SLOW", "LONG", "HUGE", "MUTE")])
    reasons = [str(answer.reason) if isinstance(answer, RewardFailure) else answer for answer in answers]
    assert reasons == [7.0, "timed_out", "refused", "not_finite", "unreadable"]
    with pytest.raises(EngineDead):
        await reward.score([sample("FINE"), sample("DIE")])


async def test_a_judgements_time_begins_when_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm_surroundings: None
) -> None:
    monkeypatch.setitem(sys.modules, "actors.vllm_engine.judging", SimpleNamespace(JudgeEngine=Engine))
    tiny_models.tokenizer().save_pretrained(tmp_path)
    settings = config(tmp_path, pattern="(.+)", timeout_s=0.6, max_concurrent_sequences=2)
    reward = JudgeReward(settings, context(role="judge"))
    assert await reward.score([sample("QUEUE")] * 20) == [7.0] * 20


async def test_what_could_not_be_read_is_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm_surroundings: None
) -> None:
    monkeypatch.setitem(sys.modules, "actors.vllm_engine.judging", SimpleNamespace(JudgeEngine=Engine))
    tiny_models.tokenizer().save_pretrained(tmp_path)
    settings = config(tmp_path, pattern=r"(\d|MUTE)", num_retries=2, retry_wait_s=0.01)
    reward = JudgeReward(settings, context(role="judge"))
    scored = await score_with_retries(reward, [sample(word) for word in ("VAGUE", "FINE", "VAGUE", "MUTE")], settings)
    assert scored.scores == [1.0, 7.0, 1.0, None]
    assert not reward._attempts


def test_a_question_is_filled_in_once() -> None:
    assert question(TEMPLATE, RewardSample("{response}", "{gold}", True, {"gold": 3})) == "P {response} R {gold} G 3? "
    assert question('{response} {"score": 1} {}', sample("A")) == 'A {"score": 1} {}'
    with pytest.raises(RewardError, match=r"asks for \{gold\}; there are prompt, response"):
        question(TEMPLATE, RewardSample("a", "b", True, {}))


def test_labels_need_tokens_of_their_own() -> None:
    tokenizer = tiny_models.tokenizer()
    numbers = tokenizer("YN")["input_ids"]
    assert label_tokens(tokenizer, {"YES": 1, "NO": 0}) == {"YES": (numbers[0],), "NO": (numbers[1],)}
    with pytest.raises(RewardError, match="begins the label 'YES' as another"):
        label_tokens(tokenizer, {"YES": 1, "YEAH": 0})


def test_a_judge_that_says_something_else_has_failed() -> None:
    labels = LabelsConfig()
    tokens = {"Yes": [5, 8], "No": [6]}
    logprobs = {5: math.log(0.3), 8: math.log(0.3), 6: math.log(0.2)}
    assert expected_value(labels, tokens, logprobs) == pytest.approx(0.75)
    low = expected_value(labels, tokens, {5: math.log(0.4), 6: math.log(0.05)})
    assert isinstance(low, RewardFailure) and "a probability of 0.45 together" in low.detail
    assert isinstance(expected_value(labels, tokens, {5: math.nan}), RewardFailure)


@pytest.mark.parametrize(
    ("text", "score"),
    [("score: 3 or rather score: 7.5.", 7.5), ("score: 11", None), ("I will not", None), ("score: -", None)],
)
def test_numbers_are_read_by_a_pattern(text: str, score: float | None) -> None:
    found = parsed(config(pattern=r"score: ([-\d.]+\d|-)", low=0, high=10), text)
    assert found == score if score is not None else isinstance(found, RewardFailure)


def test_a_judge_without_a_way_to_read_it_is_refused() -> None:
    way = {"pattern": "(.)"}
    for wrong in ({}, {"pattern": "score"}, way | {"labels": LabelsConfig()}, way | {"template": "{prompt}"}):
        with pytest.raises(ValueError):
            config(**wrong)


def test_the_examples_of_the_docstrings() -> None:
    assert doctest.testmod(judge).failed == 0
