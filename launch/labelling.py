"""From a generated slice to one with every column: all scoring roles that the run has, at the same time.

Invariants:

- A column is there exactly when its role is; a role that the run lacks leaves an empty list. The policy's ranks may
  hold the reference in the role's stead.
- This process handles references to columns, counts, and the numbers of prompts.
- Of a prompt that a reward has no score for, no sample is kept. Where prompts without signal are dropped, scores come
  first, and the other roles never see what is dropped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from actors.credit import CreditActor
from actors.critic import CriticActor
from actors.policy import PolicyActor
from actors.reference import ReferenceActor
from actors.reports import ColumnInfo
from actors.reward import RewardActor
from actors.rewards.actor import TextRewardActor
from actors.rewards.failures import RewardInfo
from actors.rollout import RolloutInfo
from actors.score_columns import SAFETY_PROMPTS, wants_tag
from cluster.group import Ref, RoleGroup
from launch.buffered import Scored
from launch.config import OnlineRunConfig
from launch.fleet import Generated
from launch.recorder import Recorder
from launch.reward_rules import ENVIRONMENT
from launch.roles import OnlineRoles

#: Why the ledger says that a prompt was dropped; where a reward failed it says so itself.
NO_SIGNAL = "no signal"

Columns = Sequence[tuple[Ref, ColumnInfo]]


@dataclass(frozen=True)
class Scores:
    """The scores of a slice, by the names that they travel under.

    ``dropped`` are prompts with a sample that has no score, and why: that sample holds NaN. ``counts`` are of failures.
    """

    columns: dict[str, list[Ref]]
    dropped: Mapping[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def flat(self) -> list[Ref]:
        """As credit assignment takes them."""
        return flat(self.columns)


@dataclass(frozen=True)
class Labelled:
    """A slice with its columns; ``info`` is of what is kept of it. None: nothing is.

    ``dropped`` prompts are not, each for a reason; ``counts`` are metrics that add up over slices.
    """

    kept: tuple[Scored, RolloutInfo] | None
    dropped: Mapping[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def flat(scores: Mapping[str, Sequence[Ref]]) -> list[Ref]:
    """Scores reward after reward, in the order of their names in ``scores``."""
    return [ref for refs in scores.values() for ref in refs]


class Labelling:
    """Has slices scored."""

    def __init__(self, config: OnlineRunConfig, roles: OnlineRoles, recorder: Recorder) -> None:
        self._roles = roles
        self._recorder = recorder
        self._rewards = config.reward_roles
        self._names = config.score_names
        self._wants_tag = wants_tag(config.total)
        self._policy_is_reference = config.policy_is_reference
        ahead, recomputes = config.online.max_staleness > 0, config.algorithm.recomputes_logprobs
        # Recomputed log-probs are of the policy as it is when training on a batch begins, and so is a moving average.
        # Where nothing runs ahead that is now; else it is when the batch is taken: asked now, the policy would answer
        # before or after an update that is under way, as it happens, and not the same for all slices. A frozen base
        # would answer the same at any time, but not its ranks, which may be in the midst of a publication: under
        # ZeRO-3 one rank would gather weights for the one, and another for the other.
        self._recomputes_late = recomputes and ahead
        self._recomputes_now = recomputes and not ahead
        self._refers_late = config.policy_is_reference and ahead

    async def label(self, generated: Generated, *, drop_flat: bool) -> Labelled:
        """Every column of a slice, without prompts that a reward failed on.

        Args:
            drop_flat: leave out prompts that nothing can be learnt from as well.

        Raises:
            ClusterError: a role failed.
        """
        rollout = generated.rollout
        asked = [self.scores(rollout, generated.prompts)]
        if generated.baseline is not None:
            asked.append(self.scores(generated.baseline, generated.prompts))
        others: dict[str, list[Ref]] = {}
        if drop_flat:
            scores = await asyncio.gather(*asked)
        else:
            scores, others = await asyncio.gather(asyncio.gather(*asked), self._others(rollout))
        own, baseline = scores[0], scores[-1]
        dropped, counts = {**baseline.dropped, **own.dropped}, sum((one.counts for one in scores), Counter())
        scored = _with(Scored(rollout, [], [], own.columns, []), others)
        kept = await self._without((scored, generated.info), dropped)
        if drop_flat and kept is not None:
            scored = kept[0]
            found = await self._roles.credit.call_one(
                0, CreditActor.without_signal, [scored.rollout], flat(scored.scores)
            )
            dropped |= dict.fromkeys(found, NO_SIGNAL)
            if (kept := await self._without(kept, found)) is not None:
                kept = _with(kept[0], await self._others(kept[0].rollout)), kept[1]
        if generated.baseline is not None and kept is not None:
            column, _ = await self._roles.credit.column_of(
                0, CreditActor.baseline, [kept[0].rollout], [generated.baseline], baseline.flat
            )
            kept = replace(kept[0], baseline_scores=[column]), kept[1]
        return Labelled(kept, dropped, counts)

    async def scores(self, rollout: Ref, prompts: Ref) -> Scores:
        """The scores of all rewards.

        Args:
            prompts: PROMPTS with the row of every prompt that is answered.

        Raises:
            ClusterError: a role failed.
        """
        parts = await asyncio.gather(*(self._scored_by(name, rollout, prompts) for name in self._rewards))
        columns: dict[str, list[Ref]] = {}
        dropped: dict[int, str] = {}
        counts = Counter[str]()
        for name, part in zip(self._rewards, parts, strict=True):
            columns[name] = self._counted(name, part)
            for _, info in part:
                if isinstance(info, RewardInfo):
                    dropped |= info.dropped
                    counts += _failures(name, info)
        if ENVIRONMENT in self._names:
            given, _ = await self._roles.credit.column_of(0, CreditActor.environment_scores, [rollout])
            columns[ENVIRONMENT] = [given]
        if self._wants_tag:
            tags, _ = await self._roles.credit.column_of(0, CreditActor.safety_prompts, [rollout], [prompts])
            columns[SAFETY_PROMPTS] = [tags]
        return Scores(columns, dropped, counts)

    async def late(self, rollouts: list[Ref]) -> dict[str, list[Ref]]:
        """What had to wait for training on a whole batch to begin, by the names of its columns; mostly nothing.

        Raises:
            ClusterError: a role failed.
        """
        policy, columns = self._roles.policy, dict[str, list[Ref]]()
        if self._refers_late:
            referred = policy.columns(PolicyActor.score_reference, rollouts)
            columns["ref_logprobs"] = await self._columns("reference", referred)
        if self._recomputes_late:
            scored = policy.columns(PolicyActor.score, rollouts)
            columns["policy_logprobs"] = await self._columns("policy_scoring", scored)
        return columns

    async def _scored_by(self, name: str, rollout: Ref, prompts: Ref) -> Columns:
        group = self._roles.rewards[name]
        if self._rewards[name].kind == "model":
            return await cast(RoleGroup[RewardActor], group).columns(RewardActor.score, [rollout])
        return await cast(RoleGroup[TextRewardActor], group).columns(TextRewardActor.score, [rollout], [prompts])

    async def _others(self, rollout: Ref) -> dict[str, list[Ref]]:
        roles, now = self._roles, self._recomputes_now
        columns = await asyncio.gather(
            self._columns("reference", self._reference(rollout)),
            self._columns("critic", roles.critic.columns(CriticActor.score, [rollout]) if roles.critic else None),
            self._columns("policy_scoring", roles.policy.columns(PolicyActor.score, [rollout]) if now else None),
        )
        return dict(zip(("ref_logprobs", "values", "policy_logprobs"), columns, strict=True))

    async def _without(
        self, slice_: tuple[Scored, RolloutInfo], dropped: Iterable[int]
    ) -> tuple[Scored, RolloutInfo] | None:
        """A slice without some prompts; none where nothing is left."""
        scored, info = slice_
        gone = set(dropped)
        if not gone:
            return slice_
        if not (kept := [prompt for prompt in info.prompt_ids if prompt not in gone]):
            return None

        async def select(columns: Sequence[Ref]) -> list[tuple[Ref, RolloutInfo]]:
            if not columns:
                return []
            return [
                await self._roles.credit.column_of(0, CreditActor.select, list(columns), [scored.rollout], kept)
            ]

        names = list(scored.scores)
        per_token = (scored.ref_logprobs, scored.values, scored.policy_logprobs)
        selected = await asyncio.gather(
            select([scored.rollout]), *map(select, per_token), *(select(scored.scores[name]) for name in names)
        )
        [(rollout, left)] = selected[0]
        ref_logprobs, values, policy_logprobs, *scores = [[ref for ref, _ in column] for column in selected[1:]]
        return Scored(rollout, ref_logprobs, values, dict(zip(names, scores, strict=True)), policy_logprobs), left

    def _reference(self, rollout: Ref) -> Awaitable[Columns] | None:
        if self._refers_late:
            return None
        if self._policy_is_reference:
            return self._roles.policy.columns(PolicyActor.score_reference, [rollout])
        if (reference := self._roles.reference) is not None:
            return reference.columns(ReferenceActor.score, [rollout])
        return None

    async def _columns(self, role: str, answer: Awaitable[Columns] | None) -> list[Ref]:
        return [] if answer is None else self._counted(role, await answer)

    def _counted(self, role: str, parts: Columns) -> list[Ref]:
        for _, part in parts:
            self._recorder.count(role, part.num_tokens, part.seconds)
        return [ref for ref, _ in parts]


def _with(scored: Scored, others: Mapping[str, list[Ref]]) -> Scored:
    """A slice with the columns of roles that are no rewards; none of a role where ``others`` has none."""
    return replace(
        scored,
        ref_logprobs=others.get("ref_logprobs", []),
        values=others.get("values", []),
        policy_logprobs=others.get("policy_logprobs", []),
    )


def _failures(name: str, info: RewardInfo) -> Counter[str]:
    """Metrics of what went wrong: samples without a score of their own, failed tries and further ones, by reason."""
    counts = Counter({f"reward/{name}/failed_{reason}": count for reason, count in info.num_failures.items()})
    counts += Counter({f"reward/{name}/tries_failed_{reason}": n for reason, n in info.num_failed_tries.items()})
    return counts + Counter({f"reward/{name}/failed": len(info.failures), f"reward/{name}/retried": info.num_retried})
