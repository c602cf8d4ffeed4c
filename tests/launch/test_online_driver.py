"""The online driver over stand-ins for the roles: dropped prompts are replaced, and no prompt is lost or trained twice.

Credit is assigned by the real role; a batch stands for the reference to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from actors.credit import CreditActor
from actors.reports import ColumnInfo, TrainReport
from actors.rollout import RolloutInfo
from actors.source import BatchInfo
from algorithms.kl import KLController
from cluster.context import RankContext
from experience.ledger import Ledger, PromptState
from experience.schema import PROMPTS, ROLLOUT, SCORES, make_batch
from experience.turns import one_turn_each
from launch import online
from launch.checkpoint import CheckpointStore
from launch.config import OnlineRunConfig
from launch.configfile import load
from launch.online import NO_SIGNAL, OnlineDriver
from launch.online_state import OnlineState
from launch.roles import OnlineRoles
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
        none = {"source": [""] * num_rows, "columns": ["{}"] * num_rows}
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

    def __init__(self, tmp_path: Path, name: str, flat: Callable[[int], bool], **online_settings: int) -> None:
        num_samples = 1 if name == "remax" else 2
        changes = {"batch_size": NUM_PROMPTS * num_samples, "scoring_batch_size": 2 * num_samples, **online_settings}
        config = load(
            ROOT / "examples" / "methods" / "dr_grpo.yaml",
            [
                f"algorithm={{name: {name}, kl: {{coefficient: 0}}}}",
                "run.num_iterations=3",
                f"rollout.sampling.samples_per_prompt={num_samples}",
                *(f"online.{key}={value}" for key, value in changes.items()),
            ],
        )
        assert isinstance(config, OnlineRunConfig)
        self.config, self.store = config, CheckpointStore(tmp_path / "checkpoints", keep=9)
        context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", 1, None, 0)
        sampling = config.rollout.sampling
        self.engine, self.policy, self.recorder = Engine(num_samples), Policy(), Recorder()
        credit = CreditActor(context, config.algorithm, sampling.max_response_tokens)
        self.roles = OnlineRoles(
            source=cast(Any, Group(Source())),
            policy=cast(Any, Group(self.policy)),
            critic=None,
            reference=None,
            reward=cast(Any, Group(Reward(flat))),
            rollout=cast(Any, Group(self.engine)),
            credit=cast(Any, Group(credit)),
        )
        kl = KLController(0.0, None, 1000)
        self.state = OnlineState(
            config, self.store, iteration=0, cursor="0", fingerprint="", kl=kl, ledger=Ledger()
        )

    async def drive(self) -> None:
        driver = OnlineDriver(
            self.config, self.roles, self.state, cast(Any, self.recorder), StopRequest(), Path("unused")
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
