"""Publishing a policy's weights to an engine, from end to end, against memcpy of the same bytes.

The policy and the engine are roles on Ray; a publication is `launch.publish.publish_weights`, which pauses the
engine, sends all weights, has them verified and loaded, and lets it go on. The first, which touches fresh memory at
every place, is shown apart.

    python -m benchmarks.weight_sync [--size medium] [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.config import ModelConfig, OptimizerConfig, PolicyConfig, RolloutConfig, SamplingConfig
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from algorithms.config import OnlineConfig
from benchmarks.groups import EQUAL_PRIORITY, LOCAL, processes, started
from benchmarks.measure import Trial, print_setting
from benchmarks.tiny import write_model
from cluster.group import RoleGroup
from cluster.session import connect
from launch.publish import publish_weights

BUCKETS_MIB = (256, 64, 16)


async def race(folder: Path, num_weights: int, rounds: int) -> None:
    """Time publications with buckets of several sizes, and memcpy."""
    model = ModelConfig(path=str(folder), dtype="float32")
    policy = PolicyConfig(model=model, optimizer=OptimizerConfig(learning_rate=1e-4), cpus_per_rank=0.5)
    sampling = SamplingConfig(max_response_tokens=8)
    rollout = RolloutConfig(sampling=sampling, max_model_tokens=64, kv_cache_bytes=64 << 20)
    async with started(
        {
            "policy": (PolicyActor, policy, (policy, OnlineConfig(), sampling, 0, 1)),
            "rollout": (RolloutActor, rollout, (rollout, model, 0)),
        }
    ) as groups:
        began = time.perf_counter()
        num_bytes = await publish(groups, 0, BUCKETS_MIB[0])
        print_setting(
            "publishing weights against memcpy",
            {
                "model": f"{num_weights / 1e6:.1f} M weights, float32, {num_bytes / 1e6:.0f} MB",
                "roles": "1 policy rank, 1 engine, on one node: shared memory",
                "first publication": f"{time.perf_counter() - began:.2f} s",
            },
        )
        source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
        trial = Trial("MB", num_bytes / 1e6)
        pids = processes(groups)
        for round_number in range(rounds):
            with trial.time("memcpy"):
                np.copyto(target, source)
            for at, mebibytes in enumerate(BUCKETS_MIB):
                with trial.time(f"publish in buckets of {mebibytes} MiB", pids):
                    await publish(groups, 1 + round_number * len(BUCKETS_MIB) + at, mebibytes)
        trial.report("memcpy")


async def publish(groups: dict[str, RoleGroup[Any]], version: int, mebibytes: int) -> int:
    """One publication."""
    return await publish_weights(groups["policy"], groups["rollout"], version=version, bucket_bytes=mebibytes << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="medium")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, connect(LOCAL, num_cpus_wanted=2):
        num_weights = write_model(Path(folder), given.size)
        asyncio.run(race(Path(folder), num_weights, given.rounds))


if __name__ == "__main__":
    # Before Ray is started, which inherits it.
    os.environ |= EQUAL_PRIORITY
    main()
