"""Generation through the rollout role against bare vLLM, on the same requests: same model, prompts, seeds, log-probs.

Three engines with the same model: vLLM's AsyncLLM alone; a RolloutActor in this process; a RolloutActor on Ray behind
the fleet that a run hands its prompts to. The role's engines have been given their weights as a run gives them. What
seeds and log-probs cost vLLM itself is shown as a way of its own.

    python -m benchmarks.rollout [--size small] [--prompts 192] [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import transformers
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from actors.config import ModelConfig, RolloutConfig, SamplingConfig
from actors.rollout import RolloutActor, engine_environment, sample_seed
from actors.weights import Tally, WeightBucket
from benchmarks.groups import EQUAL_PRIORITY, LOCAL, processes, started
from benchmarks.measure import Trial, descendants, print_setting
from benchmarks.tiny import sequences, write_model
from cluster.context import RankContext
from cluster.session import connect
from experience.schema import PROMPTS, make_batch
from launch.fleet import RolloutFleet

#: All prompts fit into one of vLLM's steps: bare vLLM 0.32 dies on CPU where one with a seed is prefilled in parts.
SHORTEST, LONGEST, RESPONSE = 4, 12, 48
SCORING_BATCH = 64
KV_CACHE_BYTES = 256 << 20
SEED = 0


class BareEngine:
    """AsyncLLM, as one uses it without us."""

    def __init__(self, folder: Path) -> None:
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folder),
                dtype="float32",
                max_model_len=LONGEST + RESPONSE,
                max_num_seqs=256,
                enforce_eager=True,
                kv_cache_memory_bytes=KV_CACHE_BYTES,
                disable_log_stats=True,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
            )
        )
        self._num_calls = 0

    async def generate(self, prompts: Sequence[Sequence[int]], *, plain: bool = False) -> int:
        """Tokens of one response to each prompt; ``plain`` asks for neither seeds nor log-probs."""
        self._num_calls += 1
        lengths = await asyncio.gather(*(self._answer(at, prompt, plain) for at, prompt in enumerate(prompts)))
        return sum(lengths)

    async def _answer(self, prompt_id: int, prompt: Sequence[int], plain: bool) -> int:
        params = SamplingParams(
            max_tokens=RESPONSE,
            temperature=1.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **({} if plain else {"seed": sample_seed(SEED, prompt_id), "logprobs": 0, "flat_logprobs": True}),
        )
        final = None
        async for output in self.llm.generate({"prompt_token_ids": prompt}, params, f"{prompt_id}-{self._num_calls}"):
            final = output
        assert final is not None, "a request ended without an output"
        return len(final.outputs[0].token_ids)


async def race(folder: Path, num_weights: int, size: str, num_prompts: int, rounds: int) -> None:
    """Time the three engines."""
    rows = sequences(num_prompts, SHORTEST, LONGEST, size)
    ids = list(range(num_prompts))
    more = {"source": ["random"] * num_prompts, "columns": ["{}"] * num_prompts}
    prompts = make_batch(PROMPTS, {"prompt_id": ids, "tokens": rows, **more})
    model = ModelConfig(path=str(folder), dtype="float32")
    config = RolloutConfig(
        sampling=SamplingConfig(max_response_tokens=RESPONSE),
        max_model_tokens=LONGEST + RESPONSE,
        kv_cache_bytes=KV_CACHE_BYTES,
        prompts_in_flight_per_engine=num_prompts,
    )
    buckets, tally = whole(folder)
    bare = BareEngine(folder)
    role = RolloutActor(RankContext("rollout", 0, 1, 0, "127.0.0.1", 0, "cpu", 1, None, SEED), config, model, SEED)
    engines = [pid for pid in descendants(os.getpid()) if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
    await role.begin_update()
    for bucket in buckets:
        await role.receive(bucket)
    await role.finish_update(tally.manifest(1))
    async with started({"rollout": (RolloutActor, config, (config, model, SEED))}) as groups:
        group = groups["rollout"]
        await group.call(RolloutActor.begin_update)
        for bucket in buckets:
            await group.call(RolloutActor.receive, bucket)
        await group.call(RolloutActor.finish_update, tally.manifest(1))
        fleet = RolloutFleet(
            group,
            prompts_in_flight_per_engine=num_prompts,
            largest_slice=SCORING_BATCH,
            on_dispatch=lambda prompt_ids, engine: None,
        )
        stored = ray.put(prompts)

        async def through_fleet() -> int:
            return sum([generated.info.num_tokens async for generated in fleet.generate(stored, ids)])

        async def through_role() -> int:
            return (await role.generate(prompts, ids))[1].num_tokens

        num_tokens = await bare.generate(rows)
        told = {"RolloutActor": await through_role(), "fleet": await through_fleet()}
        assert set(told.values()) == {num_tokens}, f"{num_tokens} tokens by bare vLLM, {told}"
        print_setting(
            "generation through the role against bare vLLM",
            {
                "model": f"{num_weights / 1e6:.1f} M weights, float32",
                "requests": f"{num_prompts} prompts of {SHORTEST} to {LONGEST} tokens, up to {RESPONSE} each; "
                f"{num_tokens} tokens in all, the same by all three engines",
            },
        )
        trial = Trial("tokens", num_tokens)
        fleet_pids = processes(groups)
        for _ in range(rounds):
            with trial.time("bare AsyncLLM", engines):
                await bare.generate(rows)
            with trial.time("RolloutActor.generate", engines):
                await through_role()
            with trial.time("Ray and RolloutFleet", fleet_pids):
                await through_fleet()
            with trial.time("bare AsyncLLM, no seeds, no log-probs", engines):
                await bare.generate(rows, plain=True)
        trial.report("bare AsyncLLM")
    await role.shutdown()
    bare.llm.shutdown()


def whole(folder: Path) -> tuple[list[WeightBucket], Tally]:
    """The folder's weights as the policy would send them."""
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bucket = WeightBucket.of(list(network.named_parameters()))
    tally = Tally()
    tally.add(bucket)
    return [bucket], tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, connect(LOCAL, num_cpus_wanted=2):
        num_weights = write_model(Path(folder), given.size)
        asyncio.run(race(Path(folder), num_weights, given.size, given.prompts, given.rounds))


if __name__ == "__main__":
    # Before Ray and the engines' processes are started, which inherit it.
    os.environ |= engine_environment(on_gpu=False) | EQUAL_PRIORITY
    main()
