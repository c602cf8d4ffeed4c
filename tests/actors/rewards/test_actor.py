"""The role: rows to text, tries, what is dropped, and the column that comes out."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from actors.config import ModelConfig
from actors.errors import RewardError
from actors.rewards.actor import TextRewardActor
from actors.rewards.config import FunctionRewardConfig
from actors.rewards.face import Reason, RewardFailure, RewardSample, TextReward
from actors.rewards.failures import RewardInfo
from actors.rewards.retries import score_with_retries
from actors.rewards.rows import kept_columns, sample_texts, tagged
from experience.schema import PROMPTS, ROLLOUT, SCORES, SchemaError, check_schema, make_batch
from experience.turns import one_turn_each
from tests.actors import tiny_models
from tests.actors.ranks import context

FAULTY = "tests.actors.rewards.faulty"


def encoded(text: str) -> list[int]:
    return list(tiny_models.tokenizer()(text)["input_ids"])


def rollout(rows: Sequence[tuple[int, str, str]], first_id: int = 0) -> pa.RecordBatch:
    """Samples ``(prompt_id, prompt, response)``; a response that ends in ``.`` is closed by EOS."""
    eos = tiny_models.tokenizer().eos_token_id
    responses = [encoded(response) + [eos] * response.endswith(".") for _, _, response in rows]
    prompt_lengths = [len(encoded(prompt)) for _, prompt, _ in rows]
    return make_batch(
        ROLLOUT,
        {
            "sample_id": [first_id + at for at in range(len(rows))],
            "prompt_id": [prompt_id for prompt_id, _, _ in rows],
            "tokens": [encoded(row[1]) + response for row, response in zip(rows, responses, strict=True)],
            "num_prompt_tokens": prompt_lengths,
            **one_turn_each(
                prompt_lengths, [a + len(b) for a, b in zip(prompt_lengths, responses, strict=True)]
            ),
            "rollout_logprobs": [[-1.0] * len(response) for response in responses],
            "policy_versions": [[0] * len(response) for response in responses],
            "finish_reason": ["stop" if row[2].endswith(".") else "length" for row in rows],
        },
    )


def prompts(columns: dict[int, dict[str, Any]]) -> pa.RecordBatch:
    kept = [json.dumps(one) for one in columns.values()]
    lists: dict[str, list[Any]] = {"tokens": [[2]] * len(kept), "source": ["test"] * len(kept), "columns": kept}
    return make_batch(PROMPTS, {"prompt_id": list(columns), **lists})


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("policy")
    tiny_models.tokenizer().save_pretrained(folder)
    return ModelConfig(path=str(folder))


def actor(policy: ModelConfig, name: str, rank: int = 0, num_ranks: int = 1, **config: Any) -> TextRewardActor:
    reward = FunctionRewardConfig(path=f"{FAULTY}:{name}", **({"retry_wait_s": 0.01} | config))
    return TextRewardActor(context(rank, num_ranks, port=1, role="reward"), reward, policy)


def test_samples_are_the_text_of_their_tokens() -> None:
    batches = [rollout([(4, "ASK 4:", " YES.")]), rollout([(2, "ASK 2:", "NO")], first_id=1)]
    columns = kept_columns([prompts({2: {"answer": 1}, 3: {}, 4: {"answer": None}})])
    samples = sample_texts(batches, range(2), columns, tiny_models.tokenizer())
    first = RewardSample("ASK 4:", " YES.", True, {"answer": None})
    second = RewardSample("ASK 2:", "NO", False, {"answer": 1})
    assert samples == [first, second]
    assert sample_texts(batches, range(1, 2), columns, tiny_models.tokenizer()) == [second]
    with pytest.raises(SchemaError, match="prompt 2 of a sample is not among the prompts"):
        sample_texts(batches, range(2), {4: {}}, tiny_models.tokenizer())


def test_a_tag_is_read_from_the_prompts_row() -> None:
    batch = rollout([(4, "A", "B"), (4, "A", "C"), (2, "A", "D")])
    rows = [prompts({2: {"tag": "safety"}, 4: {"tag": "help"}})]
    assert tagged([batch], rows, "tag", ["safety"]) == [False, False, True]
    with pytest.raises(SchemaError, match=r"prompt 4: no column 'kind' is kept: name it in data\.keep_columns"):
        tagged([batch], rows, "kind", ["safety"])


async def test_every_rank_scores_its_own_rows(policy: ModelConfig) -> None:
    batches = [rollout([(at, "ASK", "A" * (at + 1)) for at in range(7)])]
    given = [prompts({at: {} for at in range(7)})]
    ids, scores, num_tokens = [], [], 0
    for rank in range(2):
        role = actor(policy, "length", rank, 2)
        column, info = await role.score(batches, given)
        check_schema(column, SCORES)
        ids += column["sample_id"].to_pylist()
        scores += column["score"].to_pylist()
        num_tokens += info.num_tokens
        assert 0 < info.num_rows == column.num_rows < 7 and info.failures == () and info.dropped == {}
        await role.shutdown()
    assert ids == list(range(7)) and scores == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert num_tokens == 7 * 3 + sum(range(1, 8))


async def failing(policy: ModelConfig, **config: Any) -> tuple[list[float], RewardInfo]:
    """A function that never scores ``NEVER``, and others from the second time on."""
    role = actor(policy, "second_time", **config)
    word = f"{config.get('on_failure', 'DROP')}".upper()
    batch = rollout([(5, "A", f"{word} X"), (5, "A", "NEVER"), (9, "A", f"{word} Y")], first_id=50)
    column, info = await role.score([batch], [prompts({5: {}, 9: {}})])
    return column["score"].to_pylist(), info


async def test_a_sample_that_never_gets_a_score_is_named_and_dropped(policy: ModelConfig) -> None:
    scores, info = await failing(policy, num_retries=2)
    assert scores[::2] == [2.0, 2.0] and math.isnan(scores[1])
    (failure,) = info.failures
    assert (failure.sample_id, failure.prompt_id, failure.reason, failure.dropped) == (51, 5, "wrong_type", True)
    assert "NoneType" in failure.detail
    assert info.dropped == {5: "reward wrong_type"} and info.num_failures == {"wrong_type": 1}
    assert info.num_failed_tries == {"wrong_type": 3 + 1 + 1} and info.num_retried == 3 + 1


async def test_or_it_is_given_a_score_and_counted(policy: ModelConfig) -> None:
    scores, info = await failing(policy, on_failure=-1.5)
    assert scores == [2.0, -1.5, 2.0]
    assert [failure.dropped for failure in info.failures] == [False] and info.dropped == {}


async def test_without_tries_left_the_first_failure_counts() -> None:
    class Never(TextReward):
        async def score(self, samples: Sequence[RewardSample]) -> list[float | RewardFailure]:
            return [RewardFailure(Reason.CRASHED, "x" * 1000)] * len(samples)

        async def close(self) -> None: ...

    config = FunctionRewardConfig(path="a:b", num_retries=0)
    scored = await score_with_retries(Never(), [RewardSample("", "", True, {})] * 2, config)
    assert scored.scores == [None, None] and scored.num_failed_tries == {"crashed": 2} and scored.num_retried == 0
    assert len(scored.failures[0].detail) == 300
    assert (await score_with_retries(Never(), [], config)).scores == []


async def test_what_would_fail_again_is_not_tried_again() -> None:
    class Refused(TextReward):
        num_samples = 0

        async def score(self, samples: Sequence[RewardSample]) -> list[float | RewardFailure]:
            self.num_samples += len(samples)
            reasons = {"row": Reason.BAD_ROW, "refuse": Reason.REFUSED, "slow": Reason.TIMED_OUT}
            return [RewardFailure(reasons[sample.response]) for sample in samples]

        async def close(self) -> None: ...

        def take_failed_tries(self) -> Counter[str]:
            return Counter(unreachable=4)

    reward, words = Refused(), ("row", "refuse", "slow")
    config = FunctionRewardConfig(path="a:b", num_retries=2, retry_wait_s=0.0)
    scored = await score_with_retries(reward, [RewardSample("", word, True, {}) for word in words], config)
    assert reward.num_samples == 3 + 2 and scored.num_retried == 2 + 4  # its own tries as well
    assert scored.num_failed_tries == {"bad_row": 1, "refused": 1, "timed_out": 3, "unreachable": 4}


async def test_a_slice_is_answered_before_its_call_is_given_up(policy: ModelConfig) -> None:
    reward = FunctionRewardConfig(path=f"{FAULTY}:slow", retry_wait_s=0.0)
    role = TextRewardActor(replace(context(port=1, role="reward"), answer_within_s=1.5), reward, policy)
    column, info = await role.score([rollout([(1, "A", "OK"), (2, "A", "HANG")])], [prompts({1: {}, 2: {}})])
    assert info.seconds < 10 and column["score"].to_pylist()[0] == 2.0
    assert info.dropped == {2: "reward timed_out"} and info.num_failures == {"timed_out": 1}
    await role.shutdown()


async def test_what_is_configured_wrongly_ends_the_run(policy: ModelConfig) -> None:
    with pytest.raises(RewardError, match="nothing does not exist"):
        actor(policy, "nothing")
    role = actor(policy, "closer")
    with pytest.raises(RewardError, match="asks for 'answer'"):
        await role.score([rollout([(1, "A", "B")])], [prompts({1: {}})])
    await role.shutdown()
