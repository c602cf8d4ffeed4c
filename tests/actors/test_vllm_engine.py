"""The traps of vLLM 0.32 on CPU, each with its remedy and without; and engines that cannot start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import torch

from actors.config import ModelConfig
from actors.errors import EngineDead, RolloutError
from actors.weights import SharedSegment
from tests.actors import rollouts

if TYPE_CHECKING:
    from actors.vllm_engine.engine import Completion, Engine

pytestmark = [
    pytest.mark.usefixtures("vllm_surroundings"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS),
    pytest.mark.timeout(240),
]

TOLERANCE = 1e-4
PARTIAL = 48
LONG = [100, 130, 90, 20, 100]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rollouts.write_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rollouts.write_model(tmp_path_factory.mktemp("untied"), tied=False)


def start(folder: Path, **changes: Any) -> Engine:
    """An engine that prefills at most ``PARTIAL`` tokens a step."""
    from actors.vllm_engine.engine import Engine, engine_args

    model = ModelConfig(path=str(folder), dtype="float32")
    args = engine_args(rollouts.config(max_concurrent_sequences=8), model, "shared_memory", on_gpu=False, seed=0)
    for name, value in ({"max_num_batched_tokens": PARTIAL} | changes).items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return Engine(args)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(untied: Path) -> AsyncIterator[Engine]:
    started = start(untied)
    yield started
    started.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unmended(tied: Path) -> AsyncIterator[Engine]:
    """The tied model's engine without either remedy."""
    from vllm.config.weight_transfer import WeightTransferConfig

    started = start(
        tied,
        worker_extension_cls="tests.actors.vllm_defects.Unmended",
        weight_transfer_config=WeightTransferConfig(backend="without_remedies"),
    )
    yield started
    started.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mended(tied: Path) -> AsyncIterator[Engine]:
    started = start(tied)
    yield started
    started.shutdown()


async def publish(engine: Engine, model: Any, version: int) -> None:
    from actors.vllm_engine.worker import shared_memory_update

    if not engine.is_open:
        await engine.open({})
    segment = SharedSegment("test")
    try:
        await engine.begin_update()
        for bucket in rollouts.buckets(model, version)[0]:
            segment.write(bucket.payload)
            await engine.load(shared_memory_update(bucket, segment.path))
        await engine.finish_update(version)
    finally:
        segment.close()


async def answer(engine: Engine, prompt: list[int], name: str, seed: int | None) -> Completion:
    from actors.vllm_engine.engine import sampling_params

    params = sampling_params(rollouts.config().sampling, seed or 0)
    params.seed = seed
    return await engine.generate(name, prompt, params)


async def distance(engine: Engine, model: Any, seed: int | None) -> float:
    """How far the log-probs of long prompts' responses, answered at the same time, are from the slow way's."""
    prompts = rollouts.prompts(LONG).column("tokens").to_pylist()
    done = await asyncio.gather(
        *(answer(engine, prompt, f"{seed}-{place}", seed) for place, prompt in enumerate(prompts))
    )
    rows = [
        {"tokens": [*prompt, *completion.tokens], "num_prompt_tokens": len(prompt)}
        for prompt, completion in zip(prompts, done, strict=True)
    ]
    return max(
        float((torch.tensor(list(completion.logprobs)) - rollouts.logprobs(model, row)).abs().max())
        for row, completion in zip(rows, done, strict=True)
    )


async def test_seeded_requests_are_prefilled_in_parts(engine: Engine, untied: Path) -> None:
    """Trap: a seed of its own and a prompt in several parts. Also: an untied model follows its weights."""
    for version in (1, 2):
        model = rollouts.changed(untied, version)
        await publish(engine, model, version)
        assert await distance(engine, model, seed=7) < TOLERANCE
    prompts = rollouts.prompts(LONG).column("tokens").to_pylist()
    together = await asyncio.gather(*(answer(engine, p, f"t{i}", i) for i, p in enumerate(prompts)))
    alone = [await answer(engine, prompt, f"a{place}", place) for place, prompt in enumerate(prompts)]
    assert [list(done.tokens) for done in together] == [list(done.tokens) for done in alone]


async def test_a_changed_bucket_is_refused_and_the_engine_is_dead(engine: Engine, untied: Path) -> None:
    from actors.vllm_engine.worker import shared_memory_update

    bucket = rollouts.buckets(rollouts.network(untied), 3)[0][0]
    segment = SharedSegment("test")
    try:
        info = shared_memory_update(bucket, segment.path)
        bucket.payload[3] ^= 1
        segment.write(bucket.payload)
        await engine.begin_update()
        with pytest.raises(EngineDead, match=r"has digest .* it was sent with"):
            await engine.load(info)
    finally:
        segment.close()
    with pytest.raises(EngineDead):
        await answer(engine, [5, 6], "after", 1)


async def test_a_tied_model_follows_its_weights(mended: Engine, tied: Path) -> None:
    """Trap: the embedding is replaced and the packed head is not."""
    for version in (1, 2, 3):
        model = rollouts.changed(tied, version)
        await publish(mended, model, version)
        assert await distance(mended, model, seed=None) < TOLERANCE


async def test_an_update_that_lacks_parameters_is_refused(mended: Engine, tied: Path) -> None:
    from actors.vllm_engine.worker import shared_memory_update

    bucket = rollouts.buckets(rollouts.network(tied), 3)[0][0]
    segment = SharedSegment("test")
    try:
        segment.write(bucket.payload)
        await mended.begin_update()
        await mended.load(shared_memory_update(bucket, segment.path))
        with pytest.raises(EngineDead, match="of the model's parameters did not come"):
            await mended.finish_update(4)
    finally:
        segment.close()


@pytest.mark.slow
async def test_without_the_remedy_a_tied_model_answers_wrongly(unmended: Engine, tied: Path) -> None:
    await publish(unmended, rollouts.network(tied), 0)
    assert await distance(unmended, rollouts.network(tied), seed=None) < TOLERANCE
    model = rollouts.changed(tied, 1)
    await publish(unmended, model, 1)
    assert await distance(unmended, model, seed=None) > 0.1


@pytest.mark.slow
async def test_without_the_remedy_partial_prefill_kills_the_engine(unmended: Engine, tied: Path) -> None:
    with pytest.raises(EngineDead):
        await distance(unmended, rollouts.network(tied), seed=7)


@pytest.mark.slow
async def test_without_a_pause_a_step_during_an_update_kills_the_engine(untied: Path) -> None:
    """From the first weights that arrive until the last the model cannot run."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    from actors.vllm_engine.worker import shared_memory_update

    bucket = rollouts.buckets(rollouts.network(untied), 1)[0][0]
    engine, segment = start(untied), SharedSegment("test")
    try:
        segment.write(bucket.payload)
        await engine.open({})
        await engine._llm.start_weight_update()
        info = shared_memory_update(bucket, segment.path)
        await engine._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
        with pytest.raises(EngineDead):
            await asyncio.wait_for(answer(engine, [5] * 100, "under way", 1), 30)
    finally:
        engine.shutdown()
        segment.close()


async def test_an_engine_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=str(tmp_path / "nothing")):
        start(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RolloutError, match=str(tmp_path)):
        start(tmp_path)


async def test_a_context_longer_than_the_models_is_refused(tied: Path) -> None:
    with pytest.raises(RolloutError, match=r"9999.*max_position_embeddings=256.*; lower rollout.max_model_tokens"):
        start(tied, max_model_len=9999)


async def test_a_cache_too_small_for_one_sequence_is_refused(tied: Path) -> None:
    takes = 2 * 2 * 32 * 4 * 256
    with pytest.raises(RolloutError, match=f"256 tokens takes {takes} bytes.*kv_cache_bytes is 1000"):
        start(tied, kv_cache_memory_bytes=1000)


@pytest.mark.slow
async def test_a_cache_larger_than_memory_is_refused(tied: Path) -> None:
    with pytest.raises(RolloutError, match=f"kv_cache_bytes is {1 << 50},.* bytes of the node's memory are free"):
        start(tied, kv_cache_memory_bytes=1 << 50)
