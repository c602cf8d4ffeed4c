"""From a generated slice to one with every column: all scoring roles that the run has, at the same time.

Invariants:

- A column is there exactly when its role is; a role that the run lacks leaves an empty list.
- This process handles references to columns, counts, and the numbers of prompts.
- Where prompts without signal are dropped, scores come first, and the other roles never see what is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from actors.credit import CreditActor
from actors.critic import CriticActor
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.reports import ColumnInfo
from actors.reward import RewardActor
from actors.rollout import RolloutInfo
from cluster.group import Ref
from launch.buffered import Scored
from launch.config import OnlineRunConfig
from launch.fleet import Generated
from launch.recorder import Recorder
from launch.roles import OnlineRoles

Columns = list[tuple[Ref, ColumnInfo]]


@dataclass(frozen=True)
class Labelled:
    """A slice with its columns; ``info`` is of what is kept of it. None: nothing is. ``dropped`` prompts are not."""

    kept: tuple[Scored, RolloutInfo] | None
    dropped: tuple[int, ...] = ()


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

    async def label(self, generated: Generated, *, drop: bool) -> Labelled:
        """Every column of a slice; with ``drop`` without the prompts that nothing can be learnt from.

        Raises:
            ClusterError: a role failed.
        """
        rollout, info = generated.rollout, generated.info
        if not drop:
            scores, others = await asyncio.gather(self._scores(rollout), self._others(rollout, generated.baseline))
            return Labelled((Scored(rollout, scores=scores, **others), info))
        scores = await self._scores(rollout)
        dropped = await self._roles.credit.call_one(0, CreditActor.without_signal, [rollout], scores)
        if dropped:
            kept = [prompt for prompt in info.prompt_ids if prompt not in set(dropped)]
            if not kept:
                return Labelled(None, dropped)
            (rollout, info), (score, _) = await asyncio.gather(
                self._select([rollout], rollout, kept), self._select(scores, rollout, kept)
            )
            scores = [score]
        others = await self._others(rollout, generated.baseline)
        return Labelled((Scored(rollout, scores=scores, **others), info), dropped)

    async def recompute(self, rollouts: list[Ref]) -> list[Ref]:
        """The policy's log-probs of a whole batch, before it is trained on."""
        return await self._columns("policy_scoring", self._roles.policy.columns(PolicyActor.score, rollouts))

    async def _scores(self, rollout: Ref) -> list[Ref]:
        return await self._columns("reward", self._roles.reward.columns(RewardActor.score, [rollout]))

    async def _others(self, rollout: Ref, baseline: Ref | None) -> dict[str, list[Ref]]:
        roles, now = self._roles, self._recomputes_now
        columns = await asyncio.gather(
            self._columns("reference", self._reference(rollout)),
            self._columns("critic", roles.critic.columns(CriticActor.score, [rollout]) if roles.critic else None),
            self._columns("policy_scoring", roles.policy.columns(PolicyActor.score, [rollout]) if now else None),
            self._baseline(rollout, baseline),
        )
        return dict(zip(("ref_logprobs", "values", "policy_logprobs", "baseline_scores"), columns, strict=True))

    async def _baseline(self, rollout: Ref, baseline: Ref | None) -> list[Ref]:
        """What another response to the same prompts was worth."""
        if baseline is None:
            return []
        scores = await self._scores(baseline)
        column, _ = await self._roles.credit.column_of(0, CreditActor.baseline, [rollout], [baseline], scores)
        return [column]

    async def _select(self, columns: Sequence[Ref], rollout: Ref, prompt_ids: list[int]) -> tuple[Ref, RolloutInfo]:
        return await self._roles.credit.column_of(0, CreditActor.select, list(columns), [rollout], prompt_ids)

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
