"""A policy that is tuned by LoRA, and the engines that sample from it: real vLLM, merged weights and adapters."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import transformers

from actors.errors import EngineDead
from actors.rollout import RolloutActor
from actors.weights import WeightBucket, WeightManifest
from tests.actors import role_programs, rollouts, tiny_models
from tests.actors import tuning_programs as programs
from tests.actors.experience_batches import rollout
from tests.actors.ranks import Ranks

pytestmark = [
    pytest.mark.usefixtures("vllm_surroundings"),
    pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS),
    pytest.mark.timeout(240),
]

TOLERANCE = 1e-4


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


async def give(engine: RolloutActor, sent: tuple[list[WeightBucket], WeightManifest]) -> int:
    """One update; returns its bytes."""
    buckets, manifest = sent
    await engine.begin_update()
    for bucket in buckets:
        await engine.receive(bucket)
    await engine.finish_update(manifest)
    return manifest.num_bytes


async def test_engines_run_the_adapter_itself(
    folder: Path, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """The frozen weights come once, or when they change; then the adapter alone, and is never a stale one.

    Each time the engine samples from the trained policy, and from no other.
    """
    engine = rollouts.actor(folder, rollouts.config({"max_response_tokens": 96}), adapter_rank=4)
    policies = [
        ("lora", 3, {"lora": {"use_rslora": True}}),
        ("lora", 1, {"lora": {"use_rslora": True}}),
        ("qlora", 2, {"lora": {"targets": ["q_proj", "v_proj", "down_proj"]}}),
    ]
    sizes = []
    try:
        for version, (method, stage, changes) in enumerate(policies):
            parts = (await engine.endpoint()).parts
            assert parts == (("base", "adapter") if version == 0 else ("adapter",))
            parts = ("base", "adapter") if method == "qlora" else parts
            arguments = (folder, stage, method, changes, version)
            sizes.append(await give(engine, two_ranks.run(programs.publish_apart, *arguments, parts, version)[0]))
            sampled, _ = await engine.generate(rollouts.prompts([3, 20, 9], first_id=10 * version), [0, 1, 2])
            drawn = sampled.column("rollout_logprobs").to_pylist()
            for num_steps, right in ((version, True), (0, False))[: 2 if version else 1]:
                (own,) = one_rank.run(programs.logprobs_after, folder, 1, method, changes, num_steps, [sampled])
                assert (worst(own, drawn) < TOLERANCE) == right
        assert sizes[1] < sizes[0] / 4
        await _requests_under_way_go_on(engine, folder, one_rank)
        await _an_exported_adapter_is_loaded_by_vllm_itself(engine, folder, one_rank, tmp_path)
        await _an_adapter_of_unknown_layers_is_refused(engine, folder, one_rank)
    finally:
        await engine.shutdown()


async def _requests_under_way_go_on(engine: RolloutActor, folder: Path, one_rank: Ranks) -> None:
    """Each token's log-prob is that of the adapter that drew it."""
    both = [
        one_rank.run(programs.publish_apart, folder, 1, "lora", {}, version, parts, version)[0]
        for version, parts in enumerate([("base", "adapter"), ("adapter",)])
    ]
    await give(engine, both[0])
    under_way = asyncio.create_task(engine.generate(rollouts.prompts([3, 20, 9]), [0, 1, 2]))
    await asyncio.sleep(0.1)
    await give(engine, both[1])
    sampled, info = await under_way
    assert (info.oldest_version, info.newest_version) == (0, 1)
    drawn, versions = (sampled.column(name).to_pylist() for name in ("rollout_logprobs", "policy_versions"))
    for version in (0, 1):
        (own,) = one_rank.run(programs.logprobs_after, folder, 1, "lora", {}, version, [sampled])
        gaps = [
            abs(a - b)
            for row in zip(own, drawn, versions, strict=True)
            for a, b, drawer in zip(*row, strict=True)
            if drawer == version
        ]
        assert gaps and max(gaps) < TOLERANCE


async def _an_exported_adapter_is_loaded_by_vllm_itself(
    engine: RolloutActor, folder: Path, one_rank: Ranks, exported: Path
) -> None:
    """From the folder ``adapter/``, over the base, in place of the adapter that was sent: as the merged model."""
    from vllm.lora.request import LoRARequest

    changes = {"lora": {"use_rslora": True}}
    one_rank.run(programs.export, folder, 1, "lora", exported, changes)
    engine._engine._adapter = LoRARequest("exported", 2, str(exported / "adapter"))
    sampled, _ = await engine.generate(rollouts.prompts([3, 20, 9], first_id=90), [0, 1, 2])
    assert rollouts.worst(rollouts.network(exported / "merged"), sampled) < TOLERANCE
    assert rollouts.worst(rollouts.network(folder), sampled) > 10 * TOLERANCE


async def _an_adapter_of_unknown_layers_is_refused(engine: RolloutActor, folder: Path, one_rank: Ranks) -> None:
    """vLLM itself would leave them out without a word."""
    buckets, manifest = one_rank.run(programs.publish_apart, folder, 1, "lora", {}, 0, ("adapter",), 2)[0]
    renamed = [
        dataclasses.replace(
            bucket,
            entries=tuple(
                dataclasses.replace(entry, name=entry.name.replace("q_proj", "no_proj")) for entry in bucket.entries
            ),
        )
        for bucket in buckets
    ]
    with pytest.raises(EngineDead, match=r"vLLM cannot adapt 2 of the layers, model\.layers\.0\.self_attn\.no_proj"):
        await give(engine, (renamed, manifest))


def test_the_base_scores_as_a_reference_role_does(folder: Path, one_rank: Ranks, two_ranks: Ranks) -> None:
    """Packs are cut elsewhere, so but for rounding."""
    batches: list[pa.RecordBatch] = [rollout(5, seed=1, first_id=1)]
    column, _ = one_rank.run(role_programs.reference_scores, folder, "replicas", batches)[0]
    temperature = role_programs.TEMPERATURE
    assert temperature != 1.0
    for stage in (1, 3):
        found = two_ranks.run(programs.reference_scores, folder, stage, temperature, batches)
        assert worst([row for part in found for row in part], column.column(1).to_pylist()) < 1e-5
