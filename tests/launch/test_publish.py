"""Which way weights take, and who is called when. The roles are stand-ins; real ones are in the runs' tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from actors.config import ModelConfig, OptimizerConfig, PolicyConfig, RolloutConfig, SamplingConfig
from actors.weight_channels import Endpoint, Meeting, SharedBucket, Transfer, WeightMeta
from cluster.config import ClusterConfig
from launch.publish import publish_weights, weight_transfer

BUCKET = SharedBucket((WeightMeta("w", "float32", (2,)),), (8,), {"GPU-0": b""})


def policy(**placement: Any) -> PolicyConfig:
    return PolicyConfig(model=ModelConfig(path="m"), optimizer=OptimizerConfig(learning_rate=1e-4), **placement)


def rollout(**changes: Any) -> RolloutConfig:
    return RolloutConfig(sampling=SamplingConfig(max_response_tokens=4), **changes)


@pytest.mark.parametrize(
    ("trained", "engine", "resource", "way"),
    [
        ({}, {}, "GPU", "shared_memory"),
        ({"gpus_per_rank": 1}, {"gpus_per_rank": 1}, "GPU", "nccl"),
        ({"gpus_per_rank": 1}, {"gpus_per_rank": 1}, "gpu_slot", "shared_memory"),
        ({}, {"gpus_per_rank": 1}, "GPU", "shared_memory"),
        ({"gpus_per_rank": 0.4, "colocate": "a"}, {"gpus_per_rank": 0.5, "colocate": "a"}, "GPU", "ipc"),
        ({"gpus_per_rank": 0.4, "colocate": "a"}, {"gpus_per_rank": 0.5, "colocate": "b"}, "GPU", "nccl"),
        ({"gpus_per_rank": 1, "colocate": "a"}, {"gpus_per_rank": 1, "colocate": "a"}, "GPU", "nccl"),
    ],
)
def test_auto_takes_the_way_that_exists(
    trained: dict[str, Any], engine: dict[str, Any], resource: str, way: Transfer
) -> None:
    cluster = ClusterConfig(accelerator_resource=resource)
    assert weight_transfer(policy(**trained), rollout(**engine), cluster) == way
    for asked in ("shared_memory", "nccl", "ipc"):
        assert weight_transfer(policy(**trained), rollout(weight_transfer=asked, **engine), cluster) == asked


class Ranks:
    """Stands in for a group: notes each call, and answers from a table of results by rank."""

    def __init__(self, num_ranks: int, calls: list[tuple[str, Any]], answers: dict[str, Any]) -> None:
        self.num_ranks = num_ranks
        self._calls = calls
        self._answers = answers

    async def call(self, method: Callable[..., Any], *args: Any) -> list[Any]:
        self._calls.append((method.__name__, args))
        await asyncio.sleep(0)
        self._calls.append((f"{method.__name__} done", None))
        if method.__name__ == "share_next":
            shared: list[Any] = self._answers["share_next"].pop(0)
            return shared
        return self._answers.get(method.__name__) or [None] * self.num_ranks

    async def call_one(self, rank: int, method: Callable[..., Any], *args: Any) -> Any:
        return (await self.call(method, *args))[rank]


async def published(way: Transfer, workers: list[int], is_open: bool, shared: list[Any]) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []
    engines: Any = Ranks(len(workers), calls, {"endpoint": [Endpoint(way, n, is_open) for n in workers]})
    manifest = SimpleNamespace(num_bytes=8)
    answers = {"meeting_point": [("10.0.0.1", 29_500)], "weight_manifest": [manifest], "share_next": shared}
    trained: Any = Ranks(2, calls, answers | {"weight_layout": [list(BUCKET.parameters)]})
    assert await publish_weights(trained, engines, version=3, bucket_bytes=1 << 20) == 8
    assert calls[-2] == ("finish_update", (manifest,))
    return calls


async def test_nccl_opens_once_and_calls_both_ends_at_the_same_time() -> None:
    calls = await published("nccl", [2, 4], is_open=False, shared=[])
    names = [name for name, _ in calls]
    assert dict(calls)["join"] == (Meeting("10.0.0.1", 29_500, 7, (1, 3), 1 << 20),)
    assert dict(calls)["open_broadcast"] == dict(calls)["join"]
    for first, second in (("open_broadcast", "join"), ("broadcast_weights", "receive_broadcast")):
        assert max(names.index(first), names.index(second)) < names.index(f"{first} done")
    assert names.index("begin_update done") < names.index("broadcast_weights")
    again = [name for name, _ in await published("nccl", [2, 4], is_open=True, shared=[])]
    assert not {"join", "open_broadcast", "meeting_point"} & set(again)
    assert {"broadcast_weights", "receive_broadcast"} <= set(again)


async def test_ipc_packs_the_next_bucket_when_all_have_copied_the_last() -> None:
    calls = await published("ipc", [1, 1], is_open=True, shared=[[BUCKET, BUCKET], [BUCKET, BUCKET], [None, None]])
    names = [name for name, _ in calls if name in ("share_next", "receive_shared done")]
    assert names == ["share_next", "receive_shared done", "share_next", "receive_shared done", "share_next"]
