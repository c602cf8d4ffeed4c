"""Publishing: the policy's weights to every rollout engine.

Invariants:

- Every engine gets all weights, in the order they were sent, and generation stands still meanwhile. Engines that run
  with the policy's adapter get its frozen weights once, and then the adapter alone.
- This process handles references, digests, sizes, and handles to GPU memory; weights go from the policy's node to the
  engines' and pass this process's node by.
- Engines go on only when each has agreed with the policy's manifest of the whole.

Of the three ways only shared memory has been run; NCCL and CUDA-IPC wait for a GPU.
"""

from __future__ import annotations

import asyncio

from actors.config import PolicyConfig, RolloutConfig
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from actors.weight_channels import Endpoint, Meeting, Transfer
from actors.weight_sender import shared_parts
from actors.weights import WeightPart
from cluster.config import ClusterConfig
from cluster.group import RoleGroup
from launch.devices import runs_on_gpu
from launch.tasks import task_group


def weight_transfer(policy: PolicyConfig, rollout: RolloutConfig, cluster: ClusterConfig) -> Transfer:
    """The way of the weights: as configured, or the one that fits where both roles run."""
    if rollout.weight_transfer != "auto":
        return rollout.weight_transfer
    if rollout.lora == "adapter":
        return "shared_memory"
    if not (runs_on_gpu(policy, cluster) and runs_on_gpu(rollout, cluster)):
        return "shared_memory"
    # NCCL cannot connect two processes on one GPU.
    one_gpu = policy.colocate is not None and policy.colocate == rollout.colocate and policy.gpus_per_rank < 1
    return "ipc" if one_gpu else "nccl"


def adapter_rank(policy: PolicyConfig, rollout: RolloutConfig) -> int | None:
    """Rank of the adapter that engines run with; none where they get merged weights."""
    return policy.tuning.lora.rank if rollout.lora == "adapter" else None


async def publish_weights(
    policy: RoleGroup[PolicyActor], rollout: RoleGroup[RolloutActor], *, version: int, bucket_bytes: int
) -> int:
    """Give all engines the policy's present weights as ``version``; returns how many bytes each was given.

    Raises:
        ClusterError: a policy rank or an engine failed; engines that were being updated are dead.
    """
    endpoints = await rollout.call(RolloutActor.endpoint)
    match endpoints[0].transfer:
        case "shared_memory":
            parts = max((endpoint.parts for endpoint in endpoints), key=len)  # all that any of them lacks
            await _send_buckets(policy, rollout, bucket_bytes, parts)
        case "nccl":
            await _broadcast(policy, rollout, endpoints, bucket_bytes)
        case "ipc":
            await _share(policy, rollout, bucket_bytes)
    manifest = await policy.call_one(0, PolicyActor.weight_manifest, version)
    await rollout.call(RolloutActor.finish_update, manifest)
    return manifest.num_bytes


async def _send_buckets(
    policy: RoleGroup[PolicyActor],
    rollout: RoleGroup[RolloutActor],
    bucket_bytes: int,
    parts: tuple[WeightPart, ...],
) -> None:
    """Through the object store, a bucket at a time."""
    await rollout.call(RolloutActor.begin_update)
    async with task_group() as sending:  # the first failure of any rank ends the wait for the others
        for rank in range(1, policy.num_ranks):
            sending.create_task(policy.call_one(rank, PolicyActor.join_gather, bucket_bytes, parts))
        async for bucket in policy.stream(0, PolicyActor.weight_buckets, bucket_bytes, parts):
            await rollout.call(RolloutActor.receive, bucket)


async def _broadcast(
    policy: RoleGroup[PolicyActor],
    rollout: RoleGroup[RolloutActor],
    endpoints: list[Endpoint],
    bucket_bytes: int,
) -> None:
    """From the policy's first GPU to all engines' over NCCL; both ends are called at the same time."""
    if not all(endpoint.is_open for endpoint in endpoints):
        address, port = await policy.call_one(0, PolicyActor.meeting_point)
        meeting = Meeting.of(address, port, [endpoint.num_workers for endpoint in endpoints], bucket_bytes)
        await asyncio.gather(
            policy.call(PolicyActor.open_broadcast, meeting), rollout.call(RolloutActor.join, meeting)
        )
    parameters = await policy.call_one(0, PolicyActor.weight_layout)
    await rollout.call(RolloutActor.begin_update)
    await asyncio.gather(
        policy.call(PolicyActor.broadcast_weights), rollout.call(RolloutActor.receive_broadcast, parameters)
    )


async def _share(policy: RoleGroup[PolicyActor], rollout: RoleGroup[RolloutActor], bucket_bytes: int) -> None:
    """By handles to GPU memory, a bucket at a time; the next is packed when every engine has copied the last."""
    await rollout.call(RolloutActor.begin_update)
    await policy.call(PolicyActor.begin_sharing, bucket_bytes)
    while (bucket := shared_parts(await policy.call(PolicyActor.share_next))) is not None:
        await rollout.call(RolloutActor.receive_shared, bucket)
