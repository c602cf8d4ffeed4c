"""In-run evaluation: held-out prompts answered with the weights of now, scored, and measured.

Invariants:

- Training does not notice: these prompts are in no ledger and in no buffer, their samples have seeds of their own, and
  the cursor of the training data stays where it is. Generation for training goes on meanwhile.
- The prompts and their seeds are the same at every evaluation, so that its numbers compare.
- An iteration is evaluated once, whether or not the run was stopped and resumed there.
- This process holds references, numbers of prompts, and metrics; the source role computes them and writes the file.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

from actors.credit import CreditActor
from actors.evaluation import SCORE
from actors.rewards.actor import TextRewardActor
from actors.rollout import RolloutActor, RolloutInfo
from actors.source import BatchInfo, SourceActor
from cluster.group import Ref
from launch.config import OnlineRunConfig
from launch.evaluation_state import Best, EvaluationState
from launch.fleet import Generated, RolloutFleet
from launch.labelling import Labelling
from launch.online_state import OnlineState
from launch.reward_rules import UNNAMED
from launch.roles import OnlineRoles
from launch.settings import EvaluationSettings
from launch.tasks import task_group


class Evaluation:
    """Evaluates iterations of a run where they are due.

    Args:
        labelling: which scores for training as well.
        folder: of the kept responses.
    """

    def __init__(
        self,
        config: OnlineRunConfig,
        settings: EvaluationSettings,
        roles: OnlineRoles,
        labelling: Labelling,
        folder: Path,
    ) -> None:
        sampling, number = config.rollout.sampling, settings.samples_per_prompt
        self._settings = settings
        self._roles = roles
        self._labelling = labelling
        self._folder = folder
        self._rewards = tuple(name for name in config.score_names if name != UNNAMED)
        self._temperature = sampling.temperature if settings.temperature is None else settings.temperature
        self._prompts: tuple[Ref, BatchInfo] | None = None
        self._fleet = RolloutFleet(
            roles.rollout,
            prompts_in_flight_per_engine=config.rollout.prompts_in_flight_per_engine,
            largest_slice=max(1, config.online.scoring_batch_size // number),
            on_dispatch=lambda prompt_ids, engine: None,
            answer=self._answer,
        )

    def due(self, state: OnlineState) -> bool:
        """Whether an evaluation belongs between the iteration that was last done and the next."""
        iteration, every = state.iteration, self._settings.every
        if state.evaluation.iteration == iteration:
            return False
        return iteration == 0 or state.finished or bool(every and iteration % every == 0)

    async def run(self, state: OnlineState) -> dict[str, float]:
        """The metrics of the weights that the engines have, which are those of ``state.iteration``; it takes note.

        Raises:
            ClusterError: a role failed.
        """
        metrics = await self._measure(state.iteration)
        best = state.evaluation.best
        if (by := self._settings.best_by) is not None:
            # Where nothing could be scored the metric is not there, and nothing is the best.
            value = metrics.get(by.metric)
            if value is not None and by.improves(value, None if best is None else best.value):
                best = Best(state.iteration, by.metric, value)
        state.evaluation = EvaluationState(state.iteration, best)
        return metrics

    async def _measure(self, iteration: int) -> dict[str, float]:
        prompts, info = await self._heldout()
        slices: list[tuple[Generated, asyncio.Task[dict[str, list[Ref]]]]] = []
        async with task_group() as scoring:
            async for generated in self._fleet.generate(prompts, info.ids):
                if generated.info.prompt_ids:  # else all its episodes failed
                    slices.append((generated, scoring.create_task(self._scores(generated))))
        num_answered = sum(len(generated.info.prompt_ids) for generated, _ in slices)
        unanswered = {"unanswered_fraction": 1 - num_answered / info.num_rows}
        if not slices:
            return unanswered
        # Slices end in any order; what is kept has that of the data.
        slices.sort(key=lambda done: done[0].info.prompt_ids)
        columns = defaultdict[str, list[Ref]](list)
        for _, scored in slices:
            for name, refs in scored.result().items():
                columns[name] += refs
        keep_at = self._folder / f"iteration_{iteration:06d}.arrow" if self._settings.keep_samples else None
        metrics = await self._roles.source.call_one(
            0,
            SourceActor.evaluate,
            [generated.rollout for generated, _ in slices],
            [ref for refs in columns.values() for ref in refs],
            {name: len(refs) for name, refs in columns.items()},
            self._settings.rules,
            {"iteration": iteration, "temperature": self._temperature},
            keep_at,
        )
        return metrics | unanswered

    async def _heldout(self) -> tuple[Ref, BatchInfo]:
        if self._prompts is None:
            self._prompts = await self._roles.source.column_of(0, SourceActor.heldout, 0, self._settings.num_prompts)
        return self._prompts

    async def _answer(self, engine: int, prompts: Ref, rows: list[int]) -> tuple[Ref, RolloutInfo]:
        number = self._settings.samples_per_prompt
        return await self._roles.rollout.column_of(
            engine, RolloutActor.evaluate, prompts, rows, number, self._temperature
        )

    async def _scores(self, generated: Generated) -> dict[str, list[Ref]]:
        """The columns of scores: what the rewards come to, each of several rewards, and the checkers'."""
        rollout, prompts = generated.rollout, generated.prompts
        scores, *checked = await asyncio.gather(
            self._labelling.scores(rollout, prompts),
            *(
                checker.columns(TextRewardActor.score, [rollout], [prompts])
                for checker in self._roles.checkers.values()
            ),
        )
        combined, _ = await self._roles.credit.column_of(0, CreditActor.combine, [rollout], scores.flat)
        named = {name: scores.columns[name] for name in self._rewards}
        by_checker = zip(self._roles.checkers, checked, strict=True)
        return {SCORE: [combined], **named, **{name: [ref for ref, _ in parts] for name, parts in by_checker}}
