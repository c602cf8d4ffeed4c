"""In-run evaluation over stand-ins for the roles: when, with what, what is kept, and that training does not notice.

Responses are measured and written by the source's real method.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from actors.reports import ColumnInfo
from actors.rewards.rows import kept_columns
from actors.source import BatchInfo, SourceActor
from experience.schema import PROMPTS, SCORES, make_batch
from experience.table import open_table
from launch.configfile import load
from launch.evaluation_state import Best, EvaluationState
from launch.online_state import OnlineState
from tests.launch.test_online_driver import ROOT, Engine, Group, Policy, Run, Source, nothing_travels

__all__ = ["nothing_travels"]

#: What the reward says of the weights of each version, held-out prompts and others alike.
WORTH = {0: 0.25, 1: 2.0, 2: 1.0, 3: 1.5}
#: Two samples to each prompt; the second is worth 1 more.
EVALUATED = ("data.heldout=prompts.jsonl", "evaluation.samples_per_prompt=2", "evaluation.threshold=2")


class Letters:
    """A tokenizer of one letter a token, whose token 0 is special."""

    all_special_ids = (0,)

    def decode(self, tokens: Sequence[int], **_: bool) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


class HeldoutSource(Source):
    """Five held-out prompts besides."""

    evaluate, keep, kept = SourceActor.evaluate, SourceActor.keep, SourceActor.kept
    _tokenizer = Letters()

    def heldout(self, start: int, num_rows: int) -> tuple[pa.RecordBatch, BatchInfo]:
        ids = list(range(5))[start : start + num_rows]
        answers = ['{"answer": "yes"}', '{"answer": "no"}', "{}", '{"answer": "yes"}', '{"answer": "yes"}']
        more = {"source": [""] * len(ids), "columns": [answers[prompt] for prompt in ids]}
        batch = make_batch(PROMPTS, {"prompt_id": ids, "tokens": [[7, 8, prompt] for prompt in ids], **more})
        return batch, BatchInfo(len(ids), 3 * len(ids), tuple(ids), (3,) * len(ids), "")


class EvaluatedEngine(Engine):
    """Answers held-out prompts as others; keeps how it was asked."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self.asked: list[tuple[int, tuple[int, ...], int, float]] = []

    def evaluate(self, prompts: pa.RecordBatch, rows: list[int], samples_per_prompt: int, temperature: float) -> Any:
        ids = tuple(prompts.column("prompt_id")[row].as_py() for row in rows)
        self.asked.append((self.version, ids, samples_per_prompt, temperature))
        other = Engine(samples_per_prompt)
        other.version = self.version
        return other.generate(prompts, rows)


class Judge:
    """Scores by the version that answered."""

    def score(self, rollouts: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        rows = [row for batch in rollouts for row in batch.to_pylist()]
        scores = [WORTH[row["policy_versions"][0]] + row["sample_id"] % 2 for row in rows]
        column = make_batch(SCORES, {"sample_id": [row["sample_id"] for row in rows], "score": scores})
        return column, ColumnInfo(len(rows), 0, 0.0)


class Checker:
    """The first response to a prompt is right where its row says so; of one without an answer nothing is known."""

    def score(self, rollouts: list[pa.RecordBatch], prompts: list[pa.RecordBatch]) -> tuple[pa.RecordBatch, ColumnInfo]:
        answers = {prompt: columns.get("answer") for prompt, columns in kept_columns(prompts).items()}
        rows = [row for batch in rollouts for row in batch.to_pylist()]
        known = [answers[row["prompt_id"]] for row in rows]
        scores = [
            math.nan if answer is None else float(answer == "yes" and row["sample_id"] % 2 == 0)
            for row, answer in zip(rows, known, strict=True)
        ]
        column = make_batch(SCORES, {"sample_id": [row["sample_id"] for row in rows], "score": scores})
        return column, ColumnInfo(len(rows), 0, 0.0)


class SavedPolicy(Policy):
    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "weights").write_text("")


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []
        self.evaluations: list[dict[str, float]] = []

    def count(self, *_: Any) -> None: ...

    def published(self, *_: Any) -> None: ...

    def training(self, step: int, *_: Any) -> None:
        self.rows.append(("trained", step))

    def evaluation(self, step: int, metrics: dict[str, float], group: str) -> None:
        self.rows.append((group, step))
        self.evaluations.append(metrics)


class EvaluatedRun(Run):
    def __init__(self, tmp_path: Path, *words: str) -> None:
        super().__init__(tmp_path, "dr_grpo", lambda prompt: False, *words)
        self.asked, self.told, self.policy = EvaluatedEngine(2), Recorder(), SavedPolicy()
        self.engine, self.recorder = self.asked, cast(Any, self.told)
        self.roles = replace(
            self.roles,
            source=cast(Any, Group(HeldoutSource())),
            policy=cast(Any, Group(self.policy)),
            rewards=cast(Any, {"reward": Group(Judge())}),
            rollout=cast(Any, Group(self.asked)),
            checkers=cast(Any, {"right": Group(Checker())} if "right" in "".join(words) else {}),
        )


def checkpoints(run: Run) -> list[str]:
    return sorted(folder.name for folder in run.run_dir.checkpoints.glob("step-*"))


async def test_evaluates_at_intervals_with_the_same_prompts_and_training_does_not_notice(tmp_path: Path) -> None:
    run = EvaluatedRun(tmp_path / "a", *EVALUATED, "evaluation.every=2", "evaluation.num_prompts=3")
    await run.drive()
    assert run.told.rows == [
        ("evaluation", 0), ("trained", 1), ("trained", 2), ("evaluation", 2), ("trained", 3), ("evaluation", 3)
    ]  # fmt: skip
    # By version: the same three prompts each time, two samples, the temperature of the rollouts.
    for version in (0, 2, 3):
        asked = [one for one in run.asked.asked if one[0] == version]
        assert sorted(prompt for _, ids, _, _ in asked for prompt in ids) == [0, 1, 2]
        assert {one[2:] for one in asked} == {(2, 1.0)}
    assert run.told.evaluations[1] == pytest.approx(
        {
            "score": 1.5, "score_error": 0.0, "pass_at_1": 0.5, "pass_at_2": 1.0, "best_of_2": 2.0,
            "unscored_fraction": 0.0, "response_tokens": 2.0, "response_tokens_max": 2.0, "truncated_fraction": 0.0,
            "unanswered_fraction": 0.0,
        }
    )  # fmt: skip
    plain = Run(tmp_path / "b", "dr_grpo", lambda prompt: False)
    await plain.drive()
    assert run.policy.prompts == plain.policy.prompts
    assert run.asked.answered == plain.engine.answered
    assert run.state.ledger.balance() == plain.state.ledger.balance()
    assert run.state.cursor == plain.state.cursor


async def test_responses_are_kept_as_text_with_their_scores(tmp_path: Path) -> None:
    run = EvaluatedRun(tmp_path, *EVALUATED, "evaluation.num_prompts=2")
    await run.drive()
    assert [file.name for file in sorted(run.run_dir.evaluation.iterdir())] == [
        "iteration_000000.arrow", "iteration_000003.arrow"
    ]  # fmt: skip
    table = open_table(run.run_dir.evaluation / "iteration_000003.arrow")
    assert table.schema.metadata == {b"iteration": b"3", b"temperature": b"1.0"}
    assert table.to_pandas().to_dict("records")[1] == {
        "prompt_id": 0, "sample_id": 1, "prompt": "bc", "response": "ee", "response_tokens": 2, "policy_version": 3,
        "finish_reason": "stop", "score": 2.5,
    }  # fmt: skip


async def test_checkers_score_what_nothing_is_trained_on(tmp_path: Path) -> None:
    checker = "evaluation.checkers={right: {kind: checker, check: {name: exact}}}"
    run = EvaluatedRun(tmp_path, *EVALUATED, checker, "data.keep_columns=[answer]", "evaluation.ks=[1]")
    await run.drive()
    # Of five prompts one has no score; three of the others have one right response of two.
    found = {name: value for name, value in run.told.evaluations[0].items() if name.startswith("right/")}
    assert found == pytest.approx(
        {
            "right/score": 3 / 8, "right/score_error": 1 / 8, "right/pass_at_1": 3 / 8, "right/unscored_fraction": 0.2
        }
    )  # fmt: skip
    assert run.told.evaluations[0]["unscored_fraction"] == 0
    column = open_table(run.run_dir.evaluation / "iteration_000000.arrow").column("right").to_pylist()
    assert column == [1, 0, 0, 0, None, None, 1, 0, 1, 0]
    assert run.config.placements()["evaluation-right"].num_ranks == 1


async def test_the_best_checkpoint_stays_besides_the_newest(tmp_path: Path) -> None:
    best_by = ("evaluation.best_by.metric=pass_at_1", "evaluation.every=1", "run.keep_checkpoints=1")
    run = EvaluatedRun(tmp_path, *EVALUATED, *best_by, "run.checkpoint_every=1")
    run.state.models = {"reference": "abc"}
    await run.drive()
    # Version 1 passes always; version 3 is the newest.
    assert checkpoints(run) == ["step-00000001", "step-00000003"]
    named = json.loads((run.run_dir.checkpoints / "best.json").read_text())
    assert named == {"checkpoint": "step-00000001", "iteration": 1, "metric": "pass_at_1", "value": 1.0}
    read = OnlineState.read(run.config, run.store, run.store.latest())
    assert read.evaluation == EvaluationState(3, Best(1, "pass_at_1", 1.0))
    assert read.models == {"reference": "abc"}


async def test_less_can_be_better_and_the_best_is_kept_without_a_schedule(tmp_path: Path) -> None:
    best_by = ("evaluation.best_by={metric: score, mode: min}", "evaluation.every=1")
    run = EvaluatedRun(tmp_path, *EVALUATED, *best_by)
    await run.drive()
    assert run.state.evaluation.best == Best(0, "score", 0.75)
    assert checkpoints(run) == ["step-00000000", "step-00000003"]


async def test_an_iteration_is_evaluated_once_whether_or_not_the_run_stopped_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*EVALUATED, "evaluation.every=1")
    run = EvaluatedRun(tmp_path, *words)
    train = run.policy.train

    def train_and_stop(iteration: int, *args: Any) -> Any:
        run.stop.signal = signal.SIGTERM if iteration == 1 else None
        return train(iteration, *args)

    monkeypatch.setattr(run.policy, "train", train_and_stop)
    await run.drive()
    assert run.told.rows == [("evaluation", 0), ("trained", 1), ("evaluation", 1), ("trained", 2)]
    again = EvaluatedRun(tmp_path, *words)
    again.state = OnlineState.read(again.config, again.store, again.store.latest())
    await again.drive()
    assert again.told.rows == [("evaluation", 2), ("trained", 3), ("evaluation", 3)]
    done = EvaluatedRun(tmp_path, *words)
    done.state = OnlineState.read(done.config, done.store, done.store.latest())
    await done.drive()
    assert done.told.rows == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluation.every=1"], r"evaluation .*there is nothing to evaluate on; give data\.heldout"),
        ([*EVALUATED, "evaluation.best_by.metric=accuracy"], "accuracy is not measured; one of score, score_error"),
        (["evaluation.checkers.reward={kind: function, path: a.b:c}"], "'reward' cannot be the name of a checker"),
        ([*EVALUATED, "evaluation.checkers.right={kind: checker, check: {name: exact}}"], "needs the column 'answer'"),
        ([*EVALUATED, "evaluation.temperature=0"], "temperature 0 gives one response to a prompt"),
        ([*EVALUATED, "evaluation.ks=[1, 4]"], "4 of samples_per_prompt = 2 cannot be chosen"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(Exception, match=says):
        load(ROOT / "examples" / "methods" / "dr_grpo.yaml", words)
