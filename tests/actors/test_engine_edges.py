"""Engines at the edges: killed in the middle of an update, given weights in part, asked what cannot be answered."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import pytest_asyncio
import torch
import transformers

from actors.config import ModelConfig
from actors.errors import EngineDead, RolloutError
from actors.rollout import RolloutActor
from actors.weights import Tally, WeightBucket
from experience.schema import PROMPTS, make_batch
from tests.actors import rollouts
from tests.actors.ranks import context

pytestmark = [
    pytest.mark.usefixtures("vllm_surroundings"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS),
    pytest.mark.timeout(240),
]

TOLERANCE = 1e-4
#: Not a multiple of 64, to which vLLM pads embeddings: their padding never comes, and is not missing.
VOCAB = 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an output head of its own."""
    folder = rollouts.write_model(tmp_path_factory.mktemp("padded"), tied=False)
    shape = transformers.AutoConfig.from_pretrained(folder)
    shape.vocab_size = VOCAB
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Any:
    return rollouts.changed(folder, seed=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path, trained: Any) -> AsyncIterator[RolloutActor]:
    """An engine whose folder holds no weights: they are drawn, and then published."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = ModelConfig(path=str(folder), dtype="float32", from_scratch=True)
    started = RolloutActor(context(role="rollout"), rollouts.config({"samples_per_prompt": 2}), model, 5)
    with pytest.raises(RolloutError, match="has not been given"):
        await started.generate(rollouts.prompts([4]), [0])
    await rollouts.publish(started, trained, 1)
    yield started
    await started.shutdown()


def prompts(*rows: list[int]) -> pa.RecordBatch:
    ids = list(range(70, 70 + len(rows)))
    more = {"source": ["test"] * len(rows), "columns": ["{}"] * len(rows)}
    return make_batch(PROMPTS, {"prompt_id": ids, "tokens": list(rows), **more})


async def test_a_policy_from_scratch_is_served_once_published(engine: RolloutActor, trained: Any) -> None:
    batch, _ = await engine.generate(rollouts.prompts([4, 30, 9]), [0, 1, 2])
    assert rollouts.worst(trained, batch) < TOLERANCE


@pytest.mark.parametrize(
    ("rows", "message"), [([[5, 6], [5, 9999]], "prompt 71.*9999"), ([[5, 6], []], "prompt 71 is empty")]
)
async def test_what_cannot_be_answered_is_named_and_leaves_nothing_behind(
    engine: RolloutActor, rows: list[list[int]], message: str
) -> None:
    with pytest.raises(RolloutError, match=message):
        await engine.generate(prompts(*rows), [0, 1])
    assert engine._engine._llm.get_num_unfinished_requests() == 0
    await engine.generate(prompts(*rows), [0])


async def test_no_rows_are_refused(engine: RolloutActor) -> None:
    with pytest.raises(RolloutError, match="no rows"):
        await engine.generate(prompts([5, 6]), [])


async def test_a_stack_that_comes_in_part_is_refused(engine: RolloutActor, trained: Any) -> None:
    """Query, key and value are one parameter in vLLM, which counts as loaded when any of them is."""
    tally = Tally()
    await engine.begin_update()
    for name, tensor in trained.named_parameters():
        if name != "model.layers.0.self_attn.k_proj.weight":
            bucket = WeightBucket.of([(name, tensor)])
            tally.add(bucket)
            await engine.receive(bucket)
    with pytest.raises(EngineDead, match=r"came in part only, model\.layers\.0\.self_attn\.qkv_proj"):
        await engine.finish_update(tally.manifest(2))


async def test_death_in_the_middle_of_an_update_is_seen(tmp_path: Path) -> None:
    """vLLM leaves the call that was under way without an answer for ever."""
    folder = rollouts.write_model(tmp_path, tied=True)
    engine = rollouts.actor(folder)
    try:
        await rollouts.publish(engine, rollouts.network(folder), 1)
        waiting = asyncio.create_task(engine.generate(rollouts.prompts([5] * 20), list(range(20))))
        await asyncio.sleep(0.05)
        await engine.begin_update()
        (process,) = engine._engine._llm.engine_core.resources.engine_manager.processes
        under_way = asyncio.create_task(engine.receive(rollouts.buckets(rollouts.network(folder), 2)[0][0]))
        await asyncio.sleep(0)
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        for call in (under_way, waiting):
            with pytest.raises(EngineDead):
                await asyncio.wait_for(call, 15)
        assert time.monotonic() - began < 10
    finally:
        await engine.shutdown()
