"""The rollout role on real engines: what it answers, what it refuses, and what becomes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import pytest_asyncio

from actors.errors import EngineDead, RolloutError
from actors.rollout import RolloutActor, sample_seed
from actors.weights import WeightsRefused
from experience.schema import ROLLOUT, check_schema
from tests.actors import rollouts

pytestmark = [
    pytest.mark.usefixtures("vllm_surroundings"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS),
    pytest.mark.timeout(240),
]

LENGTHS = [3, 40, 8, 17, 5, 60, 12, 9]
ROWS = list(range(len(LENGTHS)))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rollouts.write_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path) -> AsyncIterator[RolloutActor]:
    """The tied model's engine, with version 1 of its weights, which are not those it booted from."""
    actor = rollouts.actor(model, rollouts.config({"samples_per_prompt": 2}))
    await rollouts.publish(actor, rollouts.changed(model, seed=1), 1)
    yield actor
    await actor.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fresh(model: Path) -> AsyncIterator[RolloutActor]:
    """Another engine, as one that was started anew: it has been given no weights."""
    actor = rollouts.actor(model, rollouts.config({"samples_per_prompt": 2}, max_concurrent_sequences=3))
    yield actor
    await actor.shutdown()


def sampled(actor: RolloutActor, monkeypatch: pytest.MonkeyPatch, **sampling: Any) -> None:
    """For one test, draw responses in another way."""
    config = actor._config
    drawn = config.sampling.model_copy(update=sampling)
    monkeypatch.setattr(actor, "_config", config.model_copy(update={"sampling": drawn}))


async def test_answers_every_prompt_with_every_sample(engine: RolloutActor, model: Path) -> None:
    prompts = rollouts.prompts(LENGTHS, first_id=10)
    batch, info = await engine.generate(prompts, [4, 1, 6])
    check_schema(batch, ROLLOUT)
    assert batch.column("prompt_id").to_pylist() == [14, 14, 11, 11, 16, 16]
    assert batch.column("sample_id").to_pylist() == [28, 29, 22, 23, 32, 33]
    for row in batch.to_pylist():
        prompt = prompts.column("tokens")[row["prompt_id"] - 10].as_py()
        assert row["tokens"][: row["num_prompt_tokens"]] == prompt
        assert len(rollouts.response(row)) == len(row["rollout_logprobs"]) == len(row["policy_versions"])
    by_id = rollouts.rows(batch)
    assert rollouts.response(by_id[28]) != rollouts.response(by_id[29])
    assert (info.prompt_ids, info.num_samples) == ((14, 11, 16), 6)
    assert info.num_tokens == sum(len(rollouts.response(row)) for row in by_id.values())
    assert (info.oldest_version, info.newest_version) == (1, 1)


async def test_logprobs_are_those_of_the_published_weights(engine: RolloutActor, model: Path) -> None:
    batch, _ = await engine.generate(rollouts.prompts(LENGTHS), ROWS)
    assert rollouts.worst(rollouts.changed(model, seed=1), batch) < TOLERANCE
    assert rollouts.worst(rollouts.network(model), batch) > 0.1, "booted from, and told apart"
    assert {version for row in batch.to_pylist() for version in row["policy_versions"]} == {1}


async def test_a_response_ends_with_eos_or_at_its_longest(engine: RolloutActor) -> None:
    batch, _ = await engine.generate(rollouts.prompts([4] * 40), list(range(40)))
    reasons = set()
    for row in batch.to_pylist():
        tokens = rollouts.response(row)
        reasons.add(row["finish_reason"])
        assert (row["finish_reason"] == "stop") == (tokens[-1] == 1)
        assert row["finish_reason"] == "stop" or len(tokens) == 24
        assert 1 not in tokens[:-1]
    assert reasons == {"stop", "length"}


async def test_a_response_depends_on_its_id_alone(engine: RolloutActor) -> None:
    prompts = rollouts.prompts(LENGTHS)
    together = rollouts.rows((await engine.generate(prompts, ROWS))[0])
    turned = rollouts.rows((await engine.generate(prompts, ROWS[::-1]))[0])
    for row in ROWS[:3]:
        alone = rollouts.rows((await engine.generate(prompts, [row]))[0])
        assert all(alone[i]["tokens"] == together[i]["tokens"] for i in alone)
    assert {i: row["tokens"] for i, row in together.items()} == {i: row["tokens"] for i, row in turned.items()}


async def test_another_seed_draws_others(engine: RolloutActor, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = rollouts.prompts(LENGTHS)
    first = rollouts.rows((await engine.generate(prompts, ROWS))[0])
    monkeypatch.setattr(engine, "_seed", 6)
    second = rollouts.rows((await engine.generate(prompts, ROWS))[0])
    assert sum(first[i]["tokens"] == second[i]["tokens"] for i in first) < len(first) // 4


async def test_held_out_prompts_are_answered_apart_and_alike_each_time(engine: RolloutActor) -> None:
    prompts = rollouts.prompts(LENGTHS)
    first, again = [rollouts.rows((await engine.evaluate(prompts, [1, 2], 3, 1.0))[0]) for _ in range(2)]
    trained = rollouts.rows((await engine.generate(prompts, ROWS))[0])
    assert sorted(first) == [3, 4, 5, 6, 7, 8] and [row["prompt_id"] for row in first.values()] == [1, 1, 1, 2, 2, 2]
    assert {i: row["tokens"] for i, row in first.items()} == {i: row["tokens"] for i, row in again.items()}
    # A sample of the same number, of the same prompt: drawn with another seed.
    assert first[3]["prompt_id"] == trained[3]["prompt_id"] and first[3]["tokens"] != trained[3]["tokens"]
    greedy = rollouts.rows((await engine.evaluate(prompts, [1], 1, 0.0))[0])
    baseline = rollouts.rows((await engine.generate(prompts, [1], True))[0])
    assert greedy[1]["tokens"] == baseline[1]["tokens"]


async def test_logprobs_are_of_the_distribution_that_was_sampled(
    engine: RolloutActor, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = rollouts.changed(model, seed=1)
    prompts = rollouts.prompts(LENGTHS)
    sampled(engine, monkeypatch, temperature=0.7)
    cooler, _ = await engine.generate(prompts, ROWS)
    assert rollouts.worst(trained, cooler, temperature=0.7) < TOLERANCE < 0.1 < rollouts.worst(trained, cooler)
    sampled(engine, monkeypatch, temperature=0.7, top_p=0.8)
    truncated, _ = await engine.generate(prompts, ROWS)
    assert rollouts.worst(trained, truncated, temperature=0.7, top_p=0.8) < TOLERANCE
    assert rollouts.worst(trained, truncated, temperature=0.7) > 0.01


async def test_stop_strings_end_a_response_and_stay_in_it(
    engine: RolloutActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled(engine, monkeypatch, stop=("A", "B", "C"))
    batch, _ = await engine.generate(rollouts.prompts([4] * 20), list(range(20)))
    ends = {2 + ord(letter) - 32 for letter in "ABC"}
    stopped = 0
    for row in batch.to_pylist():
        *before, last = rollouts.response(row)
        assert not ends & set(before)
        stopped += last in ends
        assert (row["finish_reason"] == "stop") == (last in ends | {1})
    assert stopped > 5


async def test_a_prompt_without_room_is_refused_by_its_id(engine: RolloutActor) -> None:
    prompts = rollouts.prompts([3, 256 - 24, 256 - 23], first_id=70)
    await engine.generate(prompts, [0, 1])
    with pytest.raises(RolloutError, match=r"prompt 72 has 233 tokens.*256 take prompts of 232"):
        await engine.generate(prompts, [0, 2])


async def test_requests_under_way_go_on_with_new_weights(engine: RolloutActor, model: Path) -> None:
    """Trap: a step during an update kills the engine. Trap: their seeds meet partial prefill when they go on."""
    versions = {1: rollouts.changed(model, seed=1)}
    under_way = [
        asyncio.create_task(engine.generate(rollouts.prompts([6, 50] * 16, first_id=100 * wave), list(range(32))))
        for wave in range(1, 4)
    ]
    for version in (2, 3, 4):
        await asyncio.sleep(0.15)
        versions[version] = rollouts.changed(model, seed=version)
        await rollouts.publish(engine, versions[version], version, pause_s=0.02)
    batches = [batch for batch, _ in await asyncio.gather(*under_way)]
    await rollouts.publish(engine, versions[1], 1)

    mixed = 0
    for row in pa.Table.from_batches(batches).to_pylist():
        drawn_by = row["policy_versions"]
        assert drawn_by == sorted(drawn_by)
        mixed += len(set(drawn_by)) > 1
        expected = {version: rollouts.logprobs(versions[version], row) for version in set(drawn_by)}
        for place, (version, got) in enumerate(zip(drawn_by, row["rollout_logprobs"], strict=True)):
            assert abs(got - float(expected[version][place])) < TOLERANCE
    assert mixed > 10, "the updates met requests under way"


async def test_an_engine_without_the_policys_weights_answers_nothing(fresh: RolloutActor) -> None:
    """Trap: a restarted engine has booted from the first weights, and would go on serving those."""
    with pytest.raises(RolloutError, match="has not been given the policy's weights"):
        await fresh.generate(rollouts.prompts(LENGTHS), ROWS)


async def test_another_engine_draws_the_same(fresh: RolloutActor, engine: RolloutActor, model: Path) -> None:
    await rollouts.publish(fresh, rollouts.changed(model, seed=1), 1)
    prompts = rollouts.prompts(LENGTHS)
    (here, _), (there, _) = await asyncio.gather(engine.generate(prompts, ROWS), fresh.generate(prompts, ROWS))
    assert here.column("tokens").equals(there.column("tokens"))


async def test_an_update_that_is_not_whole_kills_the_engine_and_leaves_nobody_waiting(
    fresh: RolloutActor, model: Path
) -> None:
    prompts = rollouts.prompts(LENGTHS)
    under_way = asyncio.create_task(fresh.generate(prompts, ROWS))
    await asyncio.sleep(0.05)
    sent, manifest = rollouts.buckets(rollouts.changed(model, seed=2), 2)
    await fresh.begin_update()
    for bucket in sent[:-1]:
        await fresh.receive(bucket)
    with pytest.raises(WeightsRefused, match="what came was"):
        await fresh.finish_update(manifest)
    with pytest.raises(EngineDead, match="what came was"):
        await asyncio.wait_for(under_way, 20)
    with pytest.raises(EngineDead):
        await fresh.generate(prompts, ROWS)
    with pytest.raises(EngineDead):
        await fresh.begin_update()


async def test_the_death_of_the_engines_process_is_seen(engine: RolloutActor) -> None:
    """Last, because it takes the engine with it."""
    under_way = asyncio.create_task(engine.generate(rollouts.prompts([5] * 60), list(range(60))))
    await asyncio.sleep(0.1)
    manager = engine._engine._llm.engine_core.resources.engine_manager
    (process,) = manager.processes
    began = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineDead, match="process died"):
        await asyncio.wait_for(under_way, 20)
    with pytest.raises(EngineDead):
        await engine.generate(rollouts.prompts([5]), [0])
    assert time.monotonic() - began < 10
    with pytest.raises(EngineDead):
        await engine.begin_update()


async def test_shutdown_gives_shared_memory_back(engine: RolloutActor, fresh: RolloutActor) -> None:
    assert shared_segments()
    for actor in (engine, fresh, fresh):
        await actor.shutdown()
    assert not shared_segments()


def shared_segments() -> list[str]:
    """This process's pieces of shared memory; they have no name in /dev/shm."""
    opened = (os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return [target for target in opened if target.startswith("/memfd:troupe-")]


def test_seeds_of_samples_spread() -> None:
    seeds = {sample_seed(seed, sample) for seed in range(20) for sample in range(500)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sample_seed(3, 4) == sample_seed(3, 4)


def test_a_manifest_is_compared_whole(model: Path) -> None:
    _, manifest = rollouts.buckets(rollouts.network(model), 1)
    for change in ({"num_parameters": 1}, {"num_bytes": 1}, {"digest": ""}, {"version": 2}):
        assert replace(manifest, **change) != manifest
