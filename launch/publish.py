"""Publishing: the policy's weights, bucket by bucket, to every rollout engine.

Invariants:

- Every engine gets every bucket, in the order they were sent, and generation stands still meanwhile.
- Weights travel by reference: this process sees digests and sizes, no weight.
- Engines go on only when each has agreed with the policy's manifest of the whole.
"""

from __future__ import annotations

import asyncio

from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from cluster.group import RoleGroup


async def publish_weights(
    policy: RoleGroup[PolicyActor], rollout: RoleGroup[RolloutActor], *, version: int, bucket_bytes: int
) -> int:
    """Give all engines the policy's present weights as ``version``; returns how many bytes each was given.

    Raises:
        ClusterError: a policy rank or an engine failed; engines that were being updated are dead.
    """
    others = [
        asyncio.ensure_future(policy.call_one(rank, PolicyActor.join_gather, bucket_bytes))
        for rank in range(1, policy.num_ranks)
    ]
    try:
        await rollout.call(RolloutActor.begin_update)
        async for bucket in policy.stream(0, PolicyActor.weight_buckets, bucket_bytes):
            await rollout.call(RolloutActor.receive, bucket)
        await asyncio.gather(*others)
    finally:
        for other in others:
            other.cancel()
    manifest = await policy.call_one(0, PolicyActor.weight_manifest, version)
    await rollout.call(RolloutActor.finish_update, manifest)
    return manifest.num_bytes
