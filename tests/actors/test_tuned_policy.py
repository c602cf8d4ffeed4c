"""A policy that is tuned by LoRA, and the engines that sample from it: real vLLM, merged weights."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers

from tests.actors import role_programs, rollouts, tiny_models
from tests.actors import tuning_programs as programs
from tests.actors.experience_batches import rollout
from tests.actors.ranks import Ranks

pytestmark = [pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS), pytest.mark.timeout(240)]

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rollouts.environment().items():
            patch.setenv(name, value)
        yield
        gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads 32 wide, for vLLM; layers of multiples of 64, for bitsandbytes."""
    folder = tmp_path_factory.mktemp("policy")
    shape = tiny_models.network_config("qwen2", tied=True, width=64)
    shape.num_attention_heads, shape.num_key_value_heads = 2, 2
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def worst(one: list[list[float]], other: list[list[float]]) -> float:
    assert [len(row) for row in one] == [len(row) for row in other]
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


async def test_engines_sample_from_the_tuned_policy(folder: Path, one_rank: Ranks, two_ranks: Ranks) -> None:
    """Under LoRA and QLoRA, from whole and from sharded weights, one update after another into one engine."""
    engine = rollouts.actor(folder)
    try:
        for version, (method, stage) in enumerate([("lora", 3), ("qlora", 2), ("lora", 1)], 1):
            buckets, manifest = two_ranks.run(programs.publish, folder, stage, method)[0]
            await engine.begin_update()
            for bucket in buckets:
                await engine.receive(bucket)
            await engine.finish_update(manifest)
            prompts = rollouts.prompts([3, 20, 9], first_id=10 * version)
            sampled, _ = await engine.generate(prompts, [0, 1, 2])
            ((own, base),) = one_rank.run(programs.both_logprobs, folder, 1, method, [sampled])
            drawn = sampled.column("rollout_logprobs").to_pylist()
            assert worst(own, drawn) < TOLERANCE
            assert worst(base, drawn) > 10 * TOLERANCE
    finally:
        await engine.shutdown()


def test_the_base_scores_as_a_reference_role_does(folder: Path, one_rank: Ranks, two_ranks: Ranks) -> None:
    """Packs are cut elsewhere, so but for rounding."""
    batches: list[pa.RecordBatch] = [rollout(5, seed=1, first_id=1)]
    column, _ = one_rank.run(role_programs.reference_scores, folder, "replicas", batches)[0]
    temperature = role_programs.TEMPERATURE
    assert temperature != 1.0
    for stage in (1, 3):
        found = two_ranks.run(programs.reference_scores, folder, stage, temperature, batches)
        assert worst([row for part in found for row in part], column.column(1).to_pylist()) < 1e-5
