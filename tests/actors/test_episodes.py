"""Episodes over a stand-in for the engine: what alternates, what ends them, and environments that fail."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from typing import Any

import pytest

from actors.config import EnvironmentConfig
from actors.environments.episodes import EpisodeFailed, Episodes, Prompt, whole_groups
from actors.errors import RolloutError
from actors.rollout_rows import Answer, rollout_rows
from experience.table import join
from experience.turns import Turns
from tests.actors import tiny_models

EOS = 1


class Completion:
    """What an engine answers with: tokens drawn from version 7, each with a log-prob of -its number."""

    def __init__(self, tokens: list[int], finish_reason: str) -> None:
        self.tokens, self.finish_reason = tokens, finish_reason
        self.logprobs = [-float(token) for token in tokens]
        self.versions = [(7, 0, len(tokens))]


class Engine:
    """Says its turn's number and EOS; in turns of ``cut`` as many tokens as it may, and no EOS."""

    def __init__(self, cut: Sequence[int] = ()) -> None:
        self.cut = cut
        self.asked: list[tuple[list[int], int, int]] = []

    async def take_turn(self, tokens: Sequence[int], turn: int, max_tokens: int) -> Any:
        self.asked.append((list(tokens), turn, max_tokens))
        await asyncio.sleep(0)
        return Completion([30] * max_tokens, "length") if turn in self.cut else Completion([20 + turn, EOS], "stop")


def episodes(path: str = "tests.actors.games:Echo", context_tokens: int = 64, **changes: Any) -> Episodes:
    settings = {"path": path, "max_turns": 5, "max_tokens": 40, "timeout_s": 0.3} | changes
    config = EnvironmentConfig.model_validate(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = tiny_models.tokenizer()
    return Episodes(config, tokenizer, max_turn_tokens=4, context_tokens=context_tokens)


def prompt(sample_id: int = 0, prompt_id: int = 0) -> Prompt:
    return Prompt(sample_id, prompt_id, [10, 11], {"id": prompt_id}, seed=123)


def encoded(text: str) -> list[int]:
    return list(tiny_models.tokenizer()(text)["input_ids"])


async def test_turns_and_words_alternate_and_tokens_only_grow() -> None:
    engine, played = Engine(), episodes()
    answer = await played.play(prompt(), engine.take_turn)
    said = encoded("[2]")
    opening = [10, 11, 2 + 123 % 10]
    assert list(answer.tokens) == [*opening, 20, EOS, *said, 21, EOS, *said, 22, EOS]
    assert answer.num_prompt_tokens == 3 and answer.finish_reason == "stop"
    assert [turn.start for turn in answer.turns] == [3, 8, 13]
    assert [turn.rewards for turn in answer.turns] == [[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]
    assert [asked for asked, _, _ in engine.asked] == [list(answer.tokens[:end]) for end in (3, 8, 13)]
    [row] = join([rollout_rows([answer])]).table.to_pylist()
    assert row["turn_starts"] == [3, 8, 13] and row["turn_ends"] == [5, 10, 15]
    assert row["rollout_logprobs"] == [-20, -1, -21, -1, -22, -1]
    assert row["policy_versions"] == [7] * 6
    assert row["environment_rewards"] == [0, 1, 0, 2, 0, 3]


async def test_tokens_are_paid_apart() -> None:
    answer = await episodes("tests.actors.games:Counting").play(prompt(), Engine(cut=[1]).take_turn)
    assert [turn.rewards for turn in answer.turns] == [[0, 1], [0, 1, 2, 3], [0, 1]]
    [row] = join([rollout_rows([answer])]).table.to_pylist()
    assert row["environment_rewards"] == [0, 1, 0, 1, 2, 3, 0, 1]


async def test_the_environment_reads_a_turns_text_without_its_eos() -> None:
    from tests.actors.games import Echo

    Echo.log.clear()
    await episodes().play(prompt(), Engine(cut=[1]).take_turn)
    assert [(action.text, action.finished) for action in Echo.log] == [("2", True), ("<<<<", False), ("4", True)]


async def test_a_turn_takes_the_room_that_is_left() -> None:
    engine = Engine(cut=range(9))
    answer = await episodes(max_tokens=10).play(prompt(), engine.take_turn)
    # 3 of 12 tokens are the prompt's and the opening; a turn of 4, words of 3, and what is left.
    assert [room for _, _, room in engine.asked] == [4, 2]
    assert len(answer.tokens) == 12 and answer.finish_reason == "length"
    assert len((await episodes(context_tokens=8).play(prompt(), Engine().take_turn)).tokens) == 5


async def test_turns_are_counted() -> None:
    answer = await episodes(max_turns=2).play(prompt(), Engine().take_turn)
    assert len(answer.turns) == 2 and answer.finish_reason == "length"
    assert answer.tokens[-1] == EOS, "a sample ends with a turn of the policy"


async def test_many_episodes_run_at_a_time() -> None:
    engine = Engine()
    played = episodes()
    found, failed = await whole_groups([(i, played.play(prompt(i, i), engine.take_turn)) for i in range(20)])
    assert [answer.sample_id for answer in found] == list(range(20)) and not failed
    assert [turn for _, turn, _ in engine.asked[:20]] == [0] * 20, "all began before one went on"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        *((how, how) for how in ("raised", "timed out", "said nothing", "said what is no token", "gave no step")),
        ("was cancelled", "raised"),
        *((how, "said no words") for how in ("opened with nothing", "words of None", "words in bytes")),
        *((how, "said no words") for how in ("half a character", "a number as words")),
        *((how, "gave no number") for how in ("no reward", "text as a reward", "a token without a reward")),
        *((how, "gave no finite number") for how in ("gave no finite number", "a reward beyond float32")),
        ("a token's reward without end", "gave no finite number"),
        ("many rewards", "gave no number for each token"),
        ("many ends", "gave no step"),
    ],
)
async def test_a_failure_drops_its_prompt_and_no_other(how: str, reason: str) -> None:
    played, engine = episodes("tests.actors.games:Faulty", options={"how": how}), Engine()
    samples = [(i // 2, played.play(prompt(i, i // 2), engine.take_turn)) for i in range(6)]
    found, failed = await whole_groups(samples)
    assert failed == {1: f"environment {reason}"}
    assert [answer.sample_id for answer in found] == [0, 1, 4, 5]
    assert Turns.of_rollouts(rollout_rows(found)).starts.num_rows == 4


async def test_what_is_not_the_environments_fault_ends_all() -> None:
    async def dies(*_: Any) -> Any:
        raise RolloutError("the engine is dead")

    played = episodes()
    others = [(1, played.play(prompt(1, 1), Engine().take_turn)) for _ in range(3)]
    with pytest.raises(RolloutError, match="the engine is dead"):
        await whole_groups([(0, played.play(prompt(), dies)), *others])


async def test_environments_that_cannot_begin() -> None:
    with pytest.raises(EpisodeFailed, match="said too much: 3 tokens before the first turn, of 3 in all"):
        await episodes(max_tokens=1).play(prompt(), Engine().take_turn)
    for path, message in {
        "tests.actors.games:Nothing": "does not exist",
        "tests.actors.nowhere:Echo": "cannot be imported",
        "tests.actors.rollouts:config": "not an environment; it must be a subclass",
        "tests.actors.games:Unfinished": "step is missing; write `async def step`",
        "tests.actors.games:Blocking": "step is no coroutine; write `async def step`",
    }.items():
        with pytest.raises(RolloutError, match=f"rollout.environment.path {path}.*{message}"):
            episodes(path)
    with pytest.raises(RolloutError, match=r"options of .*:Echo: got an unexpected .*'size'; its keywords are \(num_t"):
        episodes(options={"size": 3})
    with pytest.raises(RolloutError, match=r"options of .*:Faulty: missing a required argument: 'how'"):
        episodes("tests.actors.games:Faulty")


async def test_a_column_that_nobody_keeps_ends_all() -> None:
    """It would be missing from every episode."""
    played = episodes("tests.actors.games:Asking")
    with pytest.raises(RolloutError, match=r"needs the column 'answer' .*; they keep id: name it in data") as how:
        await whole_groups([(0, played.play(prompt(), Engine().take_turn))])
    assert not isinstance(how.value, EpisodeFailed)


async def test_rewards_are_finite_together() -> None:
    with pytest.raises(EpisodeFailed, match="gave no finite number: rewards that add up to"):
        await episodes("tests.actors.games:Generous").play(prompt(), Engine().take_turn)


async def test_what_failed_first_is_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def dies(*_: Any) -> Any:
        raise RolloutError("the engine is dead")

    played = episodes("tests.actors.games:Unclosed")
    with pytest.raises(EpisodeFailed, match="raised: ValueError: not closed"):
        await played.play(prompt(), Engine().take_turn)
    with pytest.raises(RolloutError, match="the engine is dead"):
        await played.play(prompt(), dies)
    assert "could not be closed" in caplog.text


def test_no_answer_gives_no_row() -> None:
    empty: list[Answer] = []
    assert rollout_rows(empty).num_rows == 0
