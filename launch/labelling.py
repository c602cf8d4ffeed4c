"""From a generated slice to one with every column: all scoring roles that the run has, at the same time.

Invariants:

- A column is there exactly when its role is; a role that the run lacks leaves an empty list.
- This process handles references to columns, and how many tokens and seconds each took.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from actors.critic import CriticActor
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.reports import ColumnInfo
from actors.reward import RewardActor
from cluster.group import Ref
from launch.buffered import Scored
from launch.config import OnlineRunConfig
from launch.recorder import Recorder
from launch.roles import OnlineRoles

Columns = list[tuple[Ref, ColumnInfo]]


class Labelling:
    """Has slices scored."""

    def __init__(self, config: OnlineRunConfig, roles: OnlineRoles, recorder: Recorder) -> None:
        self._roles = roles
        self._recorder = recorder
        self._policy_is_reference = config.policy_is_reference
        algorithm, ahead = config.algorithm, config.online.max_staleness > 0
        corrected = algorithm.correction.method != "none"
        #: A correction compares with the policy as it is when training begins. Where nothing runs ahead that is the
        #: policy of now; else it is scored when the batch is taken.
        self.recomputes_late = corrected and ahead
        self._recomputes_now = algorithm.recomputes_logprobs and not self.recomputes_late

    async def label(self, rollout: Ref) -> Scored:
        """Every column of a slice.

        Raises:
            ClusterError: a role failed.
        """
        roles = self._roles
        ref_logprobs, values, scores, policy_logprobs = await asyncio.gather(
            self._columns("reference", self._reference(rollout)),
            self._columns("critic", roles.critic.columns(CriticActor.score, [rollout]) if roles.critic else None),
            self._columns("reward", roles.reward.columns(RewardActor.score, [rollout])),
            self._columns(
                "policy_scoring",
                roles.policy.columns(PolicyActor.score, [rollout]) if self._recomputes_now else None,
            ),
        )
        return Scored(rollout, ref_logprobs, values, scores, policy_logprobs)

    async def recompute(self, rollouts: list[Ref]) -> list[Ref]:
        """The policy's log-probs of a whole batch, before it is trained on."""
        return await self._columns("policy_scoring", self._roles.policy.columns(PolicyActor.score, rollouts))

    def _reference(self, rollout: Ref) -> Awaitable[Columns] | None:
        if self._policy_is_reference:
            return self._roles.policy.columns(PolicyActor.score_reference, [rollout])
        if (reference := self._roles.reference) is not None:
            return reference.columns(ReferenceActor.score, [rollout])
        return None

    async def _columns(self, role: str, answer: Awaitable[Columns] | None) -> list[Ref]:
        if answer is None:
            return []
        parts = await answer
        for _, part in parts:
            self._recorder.count(role, part.num_tokens, part.seconds)
        return [ref for ref, _ in parts]
