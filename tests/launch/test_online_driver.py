"""The online driver over stand-ins for the roles: dropped prompts are replaced, and no prompt is lost or trained twice.

Credit is assigned by the real role; a batch stands for the reference to it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pyarrow as pa
import pytest

from actors.credit import CreditActor
from actors.reports import ColumnInfo, TrainReport
from actors.rewards.failures import RewardInfo, SampleFailure
from actors.rewards.rows import kept_columns
from actors.rollout import RolloutInfo
from actors.source import BatchInfo
from algorithms.kl import KLController
from cluster.context import RankContext
from experience.buffer import BufferState, ChunkState
from experience.ledger import Ledger, PromptState
from experience.schema import PROMPTS, REF_LOGPROBS, ROLLOUT, SCORES, make_batch
from experience.turns import one_turn_each
from launch import online
from launch.buffered import Scored, keep_buffered, read_buffered
from launch.checkpoint import CheckpointStore
from launch.config import OnlineRunConfig
from launch.configfile import load
from launch.errors import RewardsDown
from launch.labelling import NO_SIGNAL
from launch.online import OnlineDriver
from launch.online_state import OnlineState
from launch.roles import OnlineRoles
from launch.rundir import RunDir
from launch.stopping import StopRequest

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 4


class Group:
    """One rank of a role, called in this process."""

    num_ranks = 1

    def __init__(self, role: Any) -> None:
        self.role = role

    async def call_one(self, rank: int, method: Callable[..., Any], *args: Any) -> Any:
        return getattr(self.role, method.__name__)(*args)

    async def call(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        return [await self.call_one(0, method, *args)]

    async def columns(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        return await self.call(method, *args)

    async def column_of(self, rank: int, method: Callable[..., Any], *args: Any) -> Any:
        return await self.call_one(rank, method, *args)


class Source:
    """Prompts without end; the cursor is the next one's number."""

    def next_batch(self, cursor: str, num_rows: int) -> tuple[pa.RecordBatch, BatchInfo]:
        ids = list(range(int(cursor), int(cursor) + num_rows))
        tokens = [[1, 2 + prompt % 5] for prompt in ids]
        none = {"source": [""] * num_rows, "columns": [json.dumps({"even": 1 - prompt % 2}) for prompt in ids]}
        batch = make_batch(PROMPTS, {"prompt_id": ids, "tokens": tokens, **none})
        return batch, BatchInfo(num_rows, 2 * num_rows, tuple(ids), (2,) * num_rows, str(ids[-1] + 1))


class Engine:
    """Answers a prompt with two tokens, twice; greedily once."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.answered = Counter[int]()
        self.version = -1

    def generate(self, prompts: pa.RecordBatch, rows: list[int], greedy: bool = False) -> Any:
        each = 1 if greedy else self.num_samples
        ids = [prompts.column("prompt_id")[row].as_py() for row in rows]
        samples = [(prompt * each + k, prompt) for prompt in ids for k in range(each)]
        if not greedy:
            self.answered.update(ids)
        columns: dict[str, list[Any]] = {
            "sample_id": [sample for sample, _ in samples],
            "prompt_id": [prompt for _, prompt in samples],
            "tokens": [[1, 2, 3 + sample % 2, 9 if greedy else 4] for sample, _ in samples],
            "num_prompt_tokens": [2] * len(samples),
            **one_turn_each([2] * len(samples), [4] * len(samples)),
            "rollout_logprobs": [[-1.0, -1.0]] * len(samples),
            "policy_versions": [[self.version] * 2] * len(samples),
            "finish_reason": ["stop"] * len(samples),
        }
        now = self.version
        return make_batch(ROLLOUT, columns), RolloutInfo(tuple(ids), len(samples), 2 * len(samples), now, now, 0.0)


class Reward:
    """Prompts of ``flat`` get the same score for all samples, others their samples' places; greedy ones 10."""

    def __init__(self, flat: Callable[[int], bool]) -> None:
        self.flat = flat

    def score(self, rollouts: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        rows = [row for batch in rollouts for row in batch.to_pylist()]
        scores = [
            10.0 if row["tokens"][-1] == 9 else 5.0 if self.flat(row["prompt_id"]) else float(row["sample_id"] % 2)
            for row in rows
        ]
        ids = [row["sample_id"] for row in rows]
        return make_batch(SCORES, {"sample_id": ids, "score": scores}), ColumnInfo(len(rows), 0, 0.0)


class KeepingSource:
    """Keeps bytes for batches."""

    def keep(self, parts: list[bytes], path: Path) -> None:
        path.write_bytes(b"".join(parts))

    def kept(self, path: Path) -> tuple[bytes, int]:
        return path.read_bytes(), 0


def chunk_state() -> ChunkState:
    return ChunkState(iteration=0, prompt_ids=[0], num_rows=2, num_tokens=4, oldest_version=0, newest_version=0)


class TextReward:
    """A score by the parity of the row's column; what ``fails`` has none. Its second sample is one that was retried."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails = fails

    def score(self, rollouts: list[pa.RecordBatch], prompts: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, RewardInfo]:
        columns = kept_columns(prompts)
        rows = [row for batch in rollouts for row in batch.to_pylist()]
        failed = [row for row in rows if self.fails(row["prompt_id"]) and row["sample_id"] % 2]
        failures = tuple(SampleFailure(row["sample_id"], row["prompt_id"], "raised", "", True) for row in failed)
        scores = [math.nan if row in failed else 10.0 * bool(columns[row["prompt_id"]]["even"]) for row in rows]
        ids = [row["sample_id"] for row in rows]
        info = RewardInfo(len(rows), 0, 0.0, failures, {"raised": 3 * len(failures)}, 2 * len(failures))
        return make_batch(SCORES, {"sample_id": ids, "score": scores}), info


class Policy:
    """Keeps what it is trained on."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.advantages: list[list[float]] = []

    def train(self, iteration: int, rollouts: list[pa.RecordBatch], credit: list[pa.RecordBatch], *_: Any) -> Any:
        prompts = [prompt for batch in rollouts for prompt in batch.column("prompt_id").to_pylist()]
        self.prompts.append(list(dict.fromkeys(prompts)))
        self.advantages.append([row[0] for batch in credit for row in batch.column("advantages").to_pylist()])
        return TrainReport({}, 1, 1.0)

    def score_reference(self, rollouts: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        """Less by one for each iteration that was trained."""
        rows = [row for batch in rollouts for row in batch.to_pylist()]
        logprobs = [[-1.0 - len(self.prompts)] * len(row["rollout_logprobs"]) for row in rows]
        ids = [row["sample_id"] for row in rows]
        return make_batch(REF_LOGPROBS, {"sample_id": ids, "ref_logprobs": logprobs}), ColumnInfo(len(rows), 0, 0.0)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)


class Recorder:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def count(self, *_: Any) -> None: ...

    def published(self, *_: Any) -> None: ...

    def training(self, step: int, reports: Any, extra: dict[str, float], watch: Any) -> None:
        self.rows.append(extra)


class Run:
    """A run over stand-ins."""

    def __init__(
        self,
        tmp_path: Path,
        name: str,
        flat: Callable[[int], bool],
        *words: str,
        rewards: Mapping[str, Any] = MappingProxyType({}),
        **online_settings: int,
    ) -> None:
        num_samples = 1 if name == "remax" else 2
        changes = {"batch_size": NUM_PROMPTS * num_samples, "scoring_batch_size": 2 * num_samples, **online_settings}
        config = load(
            ROOT / "examples" / "methods" / "dr_grpo.yaml",
            [
                f"algorithm={{name: {name}, kl: {{coefficient: 0}}}}",
                "run.num_iterations=3",
                f"rollout.sampling.samples_per_prompt={num_samples}",
                *(f"online.{key}={value}" for key, value in changes.items()),
                *words,
            ],
        )
        assert isinstance(config, OnlineRunConfig)
        self.config, self.stop, self.run_dir = config, StopRequest(), RunDir(tmp_path)
        self.store = CheckpointStore(self.run_dir.checkpoints, keep=config.run.keep_checkpoints)
        context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", 1, None, 0)
        sampling = config.rollout.sampling
        self.engine, self.policy, self.recorder = Engine(num_samples), Policy(), Recorder()
        scored = (sampling.max_response_tokens, tuple(config.reward_roles), config.total)
        credit = CreditActor(context, config.algorithm, *scored)
        self.roles = OnlineRoles(
            source=cast(Any, Group(Source())),
            policy=cast(Any, Group(self.policy)),
            critic=None,
            reference=None,
            rewards=cast(Any, {name: Group(rewards.get(name) or Reward(flat)) for name in config.reward_roles}),
            rollout=cast(Any, Group(self.engine)),
            credit=cast(Any, Group(credit)),
        )
        kl = KLController(0.0, None, 1000)
        self.state = OnlineState(
            config, self.store, iteration=0, cursor="0", fingerprint="", kl=kl, ledger=Ledger()
        )

    async def drive(self) -> None:
        driver = OnlineDriver(
            self.config, self.roles, self.state, cast(Any, self.recorder), self.stop, self.run_dir
        )
        await driver.run()


@pytest.fixture(autouse=True)
def nothing_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    async def publish(policy: Any, rollout: Any, *, version: int, bucket_bytes: int) -> int:
        rollout.role.version = version
        return 0

    monkeypatch.setattr(online, "publish_weights", publish)


async def test_prompts_without_signal_are_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path, "dr_grpo", lambda prompt: prompt % 3 == 0, max_redraws=9)
    await run.drive()
    trained = [prompt for prompts in run.policy.prompts for prompt in prompts]
    assert [len(prompts) for prompts in run.policy.prompts] == [NUM_PROMPTS] * 3
    assert trained == [prompt for prompt in range(18) if prompt % 3]
    assert all(abs(advantage) == 0.5 for batch in run.policy.advantages for advantage in batch)
    balance = run.state.ledger.balance()
    assert balance.dropped == {NO_SIGNAL: sum(row["experience/dropped_prompts"] for row in run.recorder.rows)}
    assert balance.balances and balance.consumed == 12 and balance.in_flight == 0
    assert max(run.engine.answered.values()) == 1


async def test_replacing_has_a_bound_after_which_a_prompt_stays(tmp_path: Path) -> None:
    run = Run(tmp_path, "dr_grpo", lambda prompt: True, max_redraws=2)
    await run.drive()
    assert [len(prompts) for prompts in run.policy.prompts] == [NUM_PROMPTS] * 3
    assert [row["experience/dropped_prompts"] for row in run.recorder.rows] == [2.0 * NUM_PROMPTS] * 3
    assert [row["experience/no_signal_fraction"] for row in run.recorder.rows] == [1.0] * 3


async def test_without_redraws_nothing_is_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path, "dr_grpo", lambda prompt: prompt % 3 == 0)
    await run.drive()
    assert [prompt for prompts in run.policy.prompts for prompt in prompts] == list(range(12))
    assert not [row for row in run.recorder.rows if "experience/dropped_prompts" in row]


AVERAGE = ("policy.ema_decay=0.9", "policy.ema_is_reference=true")


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("own", [AVERAGE, ("policy.tuning.method=lora",)], ids=["average", "lora"])
async def test_the_policys_own_reference_is_asked_as_training_begins(
    own: tuple[str, ...], max_staleness: int, tmp_path: Path
) -> None:
    """Whether or not its samples were drawn, and stood ready, while the iteration before was trained on.

    The stand-in's reference moves with every iteration, which shows when it was asked. An adapter's base does not, and
    yet is not asked in the midst of a publication.
    """
    penalty = "algorithm.kl.coefficient=0.1"
    run = Run(tmp_path, "dr_grpo", lambda prompt: False, *own, penalty, max_staleness=max_staleness)
    await run.drive()
    assert [row["experience/kl_per_token"] for row in run.recorder.rows] == [0.0, 1.0, 2.0]


async def test_a_greedy_response_is_the_baseline_and_is_not_trained_on(tmp_path: Path) -> None:
    run = Run(tmp_path, "remax", lambda prompt: prompt == 1)
    await run.drive()
    # One sample a prompt: its number is the prompt's, and its score that number's parity, or 5.
    scores = [5.0 if prompt == 1 else float(prompt % 2) for prompt in range(12)]
    assert [a for batch in run.policy.advantages for a in batch] == [score - 10 for score in scores]
    assert run.recorder.rows[0]["experience/baseline_score"] == 10


def test_after_a_resume_what_is_done_with_is_passed_over(tmp_path: Path) -> None:
    """Draws 0 to 3 and 4 to 7; 1 is dropped for 8, and 0, 2, 3, 8 are trained on. 4 to 7 begin again; 8 does not."""
    run, source = Run(tmp_path, "dr_grpo", lambda prompt: False, max_redraws=1), Source()
    state, ledger = run.state, run.state.ledger
    for num_rows in (4, 4, 1):
        state.drawn(source.next_batch(state.cursor, num_rows)[1])
    ledger.dispatch(range(9), engine=0, policy_version=0)
    ledger.generate(range(9))
    ledger.drop([1], NO_SIGNAL)
    ledger.score([0, 2, 3, 8, 4, 5])
    state.consumed([0, 2, 3, 8])
    assert [drawn.cursor for drawn in state._pending] == ["4"]
    ledger.requeue([4, 5, 6, 7])  # as reading a checkpoint does
    state.cursor, state._pending = "4", []
    assert state.drawn(source.next_batch("4", 4)[1]) == [0, 1, 2, 3]
    assert state.drawn(source.next_batch(state.cursor, 3)[1]) == [1, 2]
    assert ledger.prompts(PromptState.DRAWN) == [4, 5, 6, 7, 9, 10]


TWO_REWARDS = (
    "reward=null",
    "rewards={scored: {kind: model, model: {path: x}, max_tokens_per_pack: 512}, even: {kind: function, path: 'a:b'}}",
    "total.combine={kind: linear, weights: {scored: 1, even: 0.5}}",
    "total.shaping={scale: {kind: normalise, by: running}}",
)


async def test_prompts_that_a_reward_failed_on_are_replaced_and_its_scores_are_added(tmp_path: Path) -> None:
    even = TextReward(lambda prompt: prompt in (1, 2, 9))
    run = Run(tmp_path, "dr_grpo", lambda prompt: False, *TWO_REWARDS, rewards={"even": even})
    await run.drive()
    trained = [prompt for prompts in run.policy.prompts for prompt in prompts]
    assert sorted(trained) == [prompt for prompt in range(15) if prompt not in (1, 2, 9)]
    assert [len(prompts) for prompts in run.policy.prompts] == [NUM_PROMPTS] * 3
    balance = run.state.ledger.balance()
    assert balance.dropped == {"reward raised": 3} and balance.balances and balance.consumed == 12
    rows = run.recorder.rows
    for name, total in {
        "experience/dropped_prompts": 3, "dropped/reward_raised": 3, "reward/even/failed": 3,
        "reward/even/failed_raised": 3, "reward/even/tries_failed_raised": 9, "reward/even/retried": 6,
    }.items():
        assert sum(row.get(name, 0) for row in rows) == total, name
    assert all("reward/even/failed" in row and "reward/scored/failed" not in row for row in rows)
    for row, prompts in zip(rows, run.policy.prompts, strict=True):
        mean = sum(10.0 * (1 - prompt % 2) for prompt in prompts) / NUM_PROMPTS
        assert row["reward/scored"] == 0.5 and row["reward/even"] == mean
        assert row["reward/combined"] == row["experience/score"] == 0.5 + 0.5 * mean
    # Moments are of all scores of the run, and in its checkpoint.
    assert run.state.moments["scale"].count == 24
    again = OnlineState.read(run.config, run.store, run.store.latest() or tmp_path)
    assert again.moments == run.state.moments


async def test_with_redraws_of_both_kinds(tmp_path: Path) -> None:
    """Failed prompts are none of those without signal, and neither counts for the other's bound."""
    run = Run(
        tmp_path,
        "dr_grpo",
        lambda prompt: prompt % 3 == 0,
        *TWO_REWARDS,
        rewards={"even": TextReward(lambda prompt: prompt % 3 == 1)},
        max_redraws=9,
        max_failed_redraws=9,
    )
    await run.drive()
    assert sorted(prompt for prompts in run.policy.prompts for prompt in prompts) == list(range(2, 36, 3))
    balance = run.state.ledger.balance()
    assert balance.dropped == {NO_SIGNAL: 12, "reward raised": 12} and balance.balances


async def test_a_reward_that_is_down_ends_the_run(tmp_path: Path) -> None:
    even = TextReward(lambda prompt: prompt > 5)
    run = Run(
        tmp_path, "dr_grpo", lambda prompt: False, *TWO_REWARDS, rewards={"even": even}, max_failed_redraws=3
    )
    with pytest.raises(RewardsDown, match=r"was dropped \(reward raised\), and so were 3 before it in its place"):
        await run.drive()
    assert run.state.iteration == 1


async def test_a_prompt_whose_baseline_could_not_be_scored_is_replaced(tmp_path: Path) -> None:
    """The greedy response is scored by the same rewards; sample numbers of one sample a prompt are the prompts'."""
    even = "rewards={even: {kind: function, path: 'a:b'}}"
    run = Run(
        tmp_path, "remax", lambda prompt: False, "reward=null", even, rewards={"even": TextReward(lambda at: at == 3)}
    )
    await run.drive()
    assert sorted(prompt for prompts in run.policy.prompts for prompt in prompts) == [*range(3), *range(4, 13)]
    assert [a for batch in run.policy.advantages for a in batch] == [0.0] * 12


async def test_scores_that_stand_ready_are_kept_by_name(tmp_path: Path) -> None:
    source = Group(KeepingSource())
    scores = {"scored": [b"a", b"b"], "even": [b"c"]}
    payload = Scored(cast(Any, b"rollout"), [], [], cast(Any, scores), [])
    state = BufferState(version=0, batch_rows=2, chunks=[chunk_state()])
    await keep_buffered(cast(Any, source), state, [payload], tmp_path)
    read, [again] = await read_buffered(cast(Any, source), tmp_path)
    assert read == state and again.rollout == b"rollout" and again.ref_logprobs == []
    assert again.scores == {"even": [b"c"], "scored": [b"ab"]}
