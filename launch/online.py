"""The online driver: generate with the current policy, label, train at once.

Two coroutines share a buffer. ``_produce`` draws prompts while the buffer has a slot, hands them to the engines
and has every slice scored by all scoring roles the moment it is generated. ``_consume`` takes whole batches in the
order their prompts were drawn, has credit assigned, trains policy and critic at the same time, publishes the
policy's weights, and only then frees the slot.

Invariants:

- This process holds row counts, ids, lengths, versions and references: no token passes through it.
- Nothing waits for a phase to end: a slice is scored while others are generated, and with
  ``online.max_staleness`` k the next k batches are generated while this one is trained on.
- The ledger knows every prompt drawn; its books balance at every checkpoint.
- A prompt that is dropped, because nothing can be learnt from its samples or they could not be scored, is replaced
  within its own iteration. A place in a batch is filled anew at most ``online.max_redraws`` times for the first reason
  and ``online.max_failed_redraws`` times for others.
- If either coroutine fails the other ends, and the failure is what the run ends with.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.credit import CreditActor, CreditReport
from actors.critic import CriticActor
from actors.policy import PolicyActor
from actors.reports import TrainReport
from actors.rollout import RolloutActor, RolloutInfo
from actors.score_columns import score_names
from actors.source import SourceActor
from cluster.group import Ref
from experience.buffer import Batch, BufferClosed, Chunk, ChunkInfo, Slot, VersionBuffer
from launch.buffered import Scored, complete_iterations, read_buffered
from launch.config import OnlineRunConfig
from launch.errors import RewardsDown
from launch.evaluation import Evaluation
from launch.fleet import Generated, RolloutFleet
from launch.labelling import NO_SIGNAL, Labelling
from launch.online_state import OnlineState, TextPlace
from launch.publish import publish_weights
from launch.recorder import Recorder, Stopwatch
from launch.roles import OnlineRoles
from launch.rundir import RunDir
from launch.stopping import StopRequest
from launch.tasks import task_group

DROPPED = "experience/dropped_prompts"


@dataclass(frozen=True)
class Experience:
    """All slices of one iteration by column, in the order their prompts were drawn; scores reward after reward."""

    rollouts: list[Ref]
    ref_logprobs: list[Ref]
    values: list[Ref]
    scores: list[Ref]
    policy_logprobs: list[Ref]
    baseline_scores: list[Ref]

    @classmethod
    def of(cls, batch: Batch[Scored], score_names: Sequence[str]) -> Experience:
        """The references of a batch. Its chunks are ordered, so rows do not depend on which engine was faster."""
        slices = [chunk.payload for chunk in batch.chunks]
        return cls(
            [scored.rollout for scored in slices],
            [ref for scored in slices for ref in scored.ref_logprobs],
            [ref for scored in slices for ref in scored.values],
            [ref for name in score_names for scored in slices for ref in scored.scores[name]],
            [ref for scored in slices for ref in scored.policy_logprobs],
            [ref for scored in slices for ref in scored.baseline_scores],
        )


@dataclass(frozen=True)
class _Prompts:
    """Rows of a PROMPTS batch that are to be answered, and their prompts' numbers."""

    prompts: Ref
    rows: list[int]
    ids: list[int]


@dataclass(frozen=True)
class _Redraws:
    """How often a place in a batch was filled anew."""

    no_signal: int = 0
    failed: int = 0


class OnlineDriver:
    """Runs an online algorithm over its roles until the configured iteration, or until asked to stop."""

    def __init__(
        self,
        config: OnlineRunConfig,
        roles: OnlineRoles,
        state: OnlineState,
        recorder: Recorder,
        stop: StopRequest,
        run_dir: RunDir,
    ) -> None:
        self._config = config
        self._roles = roles
        self._state = state
        self._recorder = recorder
        self._stop = stop
        self._run_dir = run_dir
        self._labelling = Labelling(config, roles, recorder)
        self._evaluation = None
        if (settings := config.evaluation) is not None:
            self._evaluation = Evaluation(config, settings, roles, self._labelling, run_dir.evaluation)
        self._drawing = asyncio.Lock()
        self._score_names = score_names(config.score_names, config.total)
        samples_per_prompt = config.rollout.sampling.samples_per_prompt
        self._samples_per_prompt = samples_per_prompt
        self._fleet = RolloutFleet(
            roles.rollout,
            prompts_in_flight_per_engine=config.rollout.prompts_in_flight_per_engine,
            largest_slice=max(1, config.online.scoring_batch_size // samples_per_prompt),
            on_dispatch=self._dispatched,
            baseline={
                "none": None, "greedy": self._answer_greedily, "initial": self._answer_as_at_first
            }[config.algorithm.needs.baseline],
        )
        self._buffer: VersionBuffer[Scored] = VersionBuffer(
            config.online.batch_size,
            config.online.max_staleness,
            num_iterations=state.num_iterations,
            version=state.iteration,
        )

    async def run(self) -> bool:
        """Train to the end. True where the run was stopped before it."""
        await self._publish(self._state.iteration)
        if (folder := self._state.buffered) is not None:
            self._buffer.restore(*await read_buffered(self._roles.source, folder))
        producer = asyncio.create_task(self._produce(), name="produce")
        try:
            with self._buffer.guard():
                await self._consume()
        except BufferClosed as closed:
            raise closed.__cause__ or closed from None
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)
        return not self._state.finished

    async def _produce(self) -> None:
        """Draw prompts for every slot that comes free, and see each through to the buffer."""
        try:
            async with task_group() as slots:
                while (slot := await self._buffer.wait_for_slot()) is not None:
                    drawn = await self._draw(slot.num_rows // self._samples_per_prompt)
                    slots.create_task(self._generate_and_score(slot, drawn))
        except Exception as error:
            self._buffer.close(error)

    async def _draw(self, num_prompts: int) -> list[_Prompts]:
        """The next prompts of the data, without those of before a resume that are done with."""
        drawn: list[_Prompts] = []
        async with self._drawing:  # each draw begins where the one before ended
            while num_prompts:
                prompts, info = await self._roles.source.column_of(
                    0, SourceActor.next_batch, self._state.cursor, num_prompts
                )
                if rows := self._state.drawn(info):
                    drawn.append(_Prompts(prompts, rows, [info.ids[row] for row in rows]))
                num_prompts -= len(rows)
        return drawn

    async def _answer_greedily(self, engine: int, prompts: Ref, rows: list[int]) -> Ref:
        return (await self._roles.rollout.column_of(engine, RolloutActor.generate, prompts, rows, True))[0]

    async def _answer_as_at_first(self, engine: int, prompts: Ref, rows: list[int]) -> Ref:
        engines = self._roles.baseline
        assert engines is not None, "launch.online_rules require it"
        return (await engines.column_of(engine % engines.num_ranks, RolloutActor.generate, prompts, rows))[0]

    def _dispatched(self, prompt_ids: Sequence[int], engine: int) -> None:
        self._state.ledger.dispatch(prompt_ids, engine=engine, policy_version=self._buffer.version)

    async def _generate_and_score(self, slot: Slot, drawn: list[_Prompts], redraws: _Redraws = _Redraws()) -> None:
        async with task_group() as scoring:
            for part in drawn:
                async for generated in self._fleet.generate(part.prompts, part.ids, part.rows):
                    info = generated.info
                    self._state.ledger.generate(info.prompt_ids)
                    self._recorder.count("rollout", info.num_tokens, self._fleet.take_busy_s())
                    if info.num_samples:
                        scoring.create_task(self._score(slot, generated, redraws))
                    if info.dropped:
                        scoring.create_task(self._replace(slot, info.dropped, redraws))

    async def _score(self, slot: Slot, generated: Generated, redraws: _Redraws) -> None:
        """Have every scoring role add its column, and put the slice into the buffer; replace prompts that it drops."""
        drop_flat = redraws.no_signal < self._config.online.max_redraws
        labelled = await self._labelling.label(generated, drop_flat=drop_flat)
        self._state.counts[slot.iteration] += labelled.counts
        if labelled.kept is not None:
            scored, info = labelled.kept
            self._state.ledger.score(info.prompt_ids)
            self._buffer.put(Chunk(_chunk_info(slot, info), scored))
        await self._replace(slot, labelled.dropped, redraws)

    async def _replace(self, slot: Slot, dropped: Mapping[int, str], redraws: _Redraws) -> None:
        """Drop prompts, each for its reason, and fill their places with others.

        Raises:
            RewardsDown: of a place that was filled anew so often every prompt failed.
        """
        by_reason = defaultdict[str, list[int]](list)
        for prompt, reason in dropped.items():
            by_reason[reason].append(prompt)
        async with task_group() as filling:
            for reason, prompts in by_reason.items():
                flat = reason == NO_SIGNAL
                if not flat and redraws.failed >= self._config.online.max_failed_redraws:
                    raise RewardsDown(
                        f"prompt {prompts[0]} was dropped ({reason}), and so were {redraws.failed} before it in its "
                        "place; the log of the reward, or of the engine for an environment, names the failures. Mend "
                        "it and go on with --resume, or set a reward's on_failure to a score, or "
                        "online.max_failed_redraws higher"
                    )
                self._state.ledger.drop(prompts, reason)
                counts = self._state.counts[slot.iteration]
                counts[f"dropped/{reason.replace(' ', '_')}"] += len(prompts)
                counts[DROPPED] += len(prompts)
                again = _Redraws(redraws.no_signal + flat, redraws.failed + (not flat))
                others = await self._draw(len(prompts))
                filling.create_task(self._generate_and_score(slot, others, again))

    async def _consume(self) -> None:
        state, saved = self._state, False
        if evaluated := await self._evaluate():
            self._recorder.evaluation(state.iteration, evaluated, "evaluation")
            if state.evaluation.best_is_of(state.iteration):
                await self._save()
        while not state.finished and not self._stop.requested:
            watch = Stopwatch()
            batch = await self._buffer.take()
            watch.lap("wait_for_experience")
            experience = Experience.of(batch, self._score_names)
            experience = replace(experience, **await self._labelling.late(experience.rollouts))
            credit, credit_report = await self._assign_credit(experience)
            watch.lap("assign_credit")
            reports = await self._train_and_publish(experience, credit)
            watch.lap("train_and_publish")
            state.consumed(batch.prompt_ids)
            state.adapt_kl(credit_report)
            state.moments = dict(credit_report.moments)
            self._buffer.release(state.iteration)
            if evaluated := await self._evaluate():
                watch.lap("evaluate")
            if saved := state.checkpoint_due():
                await self._save()
                watch.lap("checkpoint")
            extra = {**credit_report.metrics, "kl_coefficient": credit_report.kl_coefficient}
            extra |= self._counted(batch.iteration)
            self._recorder.training(state.iteration, reports, extra, watch)
            if evaluated:
                self._recorder.evaluation(state.iteration, evaluated, "evaluation")
        if not saved:  # it was stopped, maybe before the first iteration
            await self._save()

    async def _evaluate(self) -> dict[str, float]:
        """What held-out responses with the weights of now are worth; nothing where that is not due.

        A run that is to stop before its end leaves it to the one that goes on.
        """
        if self._evaluation is None or not self._evaluation.due(self._state):
            return {}
        if self._stop.requested and not self._state.finished:
            return {}
        return await self._evaluation.run(self._state)

    async def _save(self) -> None:
        await self._state.save(self._roles, *complete_iterations(*self._buffer.export()))

    async def _assign_credit(self, experience: Experience) -> tuple[Ref, CreditReport]:
        return await self._roles.credit.column_of(
            0,
            CreditActor.assign,
            experience.rollouts,
            experience.ref_logprobs,
            experience.values,
            experience.scores,
            experience.policy_logprobs,
            experience.baseline_scores,
            self._state.kl.coefficient,
            self._state.iteration,
            self._experience_file(),
            self._state.moments,
        )

    def _counted(self, iteration: int) -> dict[str, float]:
        """What was counted while an iteration was generated; 0 is said too of what can be counted at all."""
        rewards = self._config.reward_roles
        over_text = [name for name, reward in rewards.items() if reward.kind != "model"]
        counts = {f"reward/{name}/{what}": 0 for name in over_text for what in ("failed", "retried")}
        if over_text or self._config.online.max_redraws or self._config.rollout.environment is not None:
            counts[DROPPED] = 0
        return {name: float(count) for name, count in (counts | self._state.counts.pop(iteration, Counter())).items()}

    async def _train_and_publish(self, experience: Experience, credit: Ref) -> dict[str, TrainReport]:
        """One iteration of the trained roles, at the same time, each on its own ranks.

        The policy's weights go to the engines as soon as it is done, whether or not the critic is.
        """
        reports = await asyncio.gather(
            self._policy_iteration(experience, credit), self._critic_iteration(experience, credit)
        )
        return {**reports[0], **reports[1]}

    async def _critic_iteration(self, experience: Experience, credit: Ref) -> dict[str, TrainReport]:
        if (critic := self._roles.critic) is None:
            return {}
        iteration = self._state.iteration
        done = await critic.call(CriticActor.train, iteration, experience.rollouts, experience.values, [credit])
        return {"critic": done[0]}

    async def _policy_iteration(self, experience: Experience, credit: Ref) -> dict[str, TrainReport]:
        iteration, reports = self._state.iteration, {}
        if iteration >= self._config.algorithm.critic_warmup_iterations:
            ref_logprobs = experience.ref_logprobs if self._config.algorithm.kl.in_loss else []
            done = await self._roles.policy.call(
                PolicyActor.train,
                iteration,
                experience.rollouts,
                [credit],
                ref_logprobs,
                self._state.kl.coefficient,
                await self._draw_text(),
            )
            reports["policy"] = done[0]
        await self._publish(iteration + 1)
        return reports

    async def _draw_text(self) -> list[Ref]:
        """Pre-training text for an iteration's updates, where the run mixes it in."""
        if (source := self._roles.pretraining_source) is None:
            return []
        if (place := self._state.pretraining) is None:
            described = await source.call_one(0, SourceActor.describe)
            place = TextPlace(described.first_cursor, described.fingerprint)
        algorithm = self._config.algorithm
        num_rows = algorithm.pretraining.examples_per_sample * self._config.online.batch_size * algorithm.num_epochs
        text, info = await source.column_of(0, SourceActor.next_batch, place.cursor, num_rows)
        self._state.pretraining = replace(place, cursor=info.next_cursor)
        return [text]

    async def _publish(self, version: int) -> None:
        began = time.perf_counter()
        num_bytes = await publish_weights(
            self._roles.policy, self._roles.rollout, version=version, bucket_bytes=self._config.rollout.bucket_bytes
        )
        self._recorder.published(num_bytes, time.perf_counter() - began)

    def _experience_file(self) -> Path | None:
        if not self._config.run.keep_experience:
            return None
        return self._run_dir.experience / f"iteration_{self._state.iteration:06d}.arrow"


def _chunk_info(slot: Slot, info: RolloutInfo) -> ChunkInfo:
    return ChunkInfo(
        iteration=slot.iteration,
        prompt_ids=tuple(info.prompt_ids),
        num_rows=info.num_samples,
        num_tokens=info.num_tokens,
        oldest_version=info.oldest_version,
        newest_version=info.newest_version,
    )
