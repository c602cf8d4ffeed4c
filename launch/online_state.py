"""Where an online run stands between two iterations: what its checkpoint holds beside the roles' own states."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actors.credit import CreditReport
from actors.critic import CriticActor
from actors.policy import PolicyActor
from algorithms.kl import KLController
from algorithms.moments import RunningMoments
from experience.ledger import Ledger, PromptState
from experience.table import open_table, write_table
from launch.buffered import buffered_prompts, keep_buffered
from launch.evaluation_state import EvaluationState, write_best

if TYPE_CHECKING:
    from actors.source import BatchInfo, SourceDescription
    from algorithms.config import KLConfig
    from experience.buffer import BufferState
    from launch.buffered import Scored
    from launch.checkpoint import CheckpointStore
    from launch.config import OnlineRunConfig
    from launch.roles import OnlineRoles

STATE_FILE = "state.json"
LEDGER_FILE = "ledger.arrow"
BUFFER_FOLDER = "buffer"
_IN_FLIGHT = (PromptState.DRAWN, PromptState.DISPATCHED, PromptState.GENERATED, PromptState.SCORED)


@dataclass(frozen=True)
class _Drawn:
    """A draw of prompts that are not all done with: where in the data it starts, and its prompts."""

    cursor: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class TextPlace:
    """Where in the pre-training text the next update begins, and the digest of what that means."""

    cursor: str
    fingerprint: str


class OnlineState:
    """The iteration, the KL coefficient, the place in the data, the ledger, counts, and moments of the scores.

    ``cursor`` is where the next batch of prompts is drawn from, in data of this ``fingerprint``. A checkpoint keeps the
    samples that stand ready for training, and the cursor of the first draw with a prompt that is neither ready nor
    done with: after a resume prompts are drawn from there again under the same ids, those that are done with are passed
    over, and the others are answered with the seeds that follow from their ids. So no prompt is lost and none is
    trained on twice. Nor is a count lost: what failed or was dropped of an iteration that is generated in part stays
    counted, and what fails when the rest of it is answered again is counted besides.
    """

    def __init__(
        self,
        config: OnlineRunConfig,
        store: CheckpointStore,
        *,
        iteration: int,
        cursor: str,
        fingerprint: str,
        kl: KLController,
        ledger: Ledger,
        pretraining: TextPlace | None = None,
        evaluation: EvaluationState | None = None,
        moments: Mapping[str, RunningMoments] | None = None,
        counts: Mapping[int, Mapping[str, int]] | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._pending: list[_Drawn] = []
        #: Where the samples lie that are ready for training, after a resume.
        self.buffered: Path | None = None
        self.iteration = iteration
        self.cursor = cursor
        self.fingerprint = fingerprint
        self.kl = kl
        self.ledger = ledger
        #: Digests of the models that a checkpoint does not hold: see ``launch.resuming``.
        self.models: dict[str, str] = {}
        #: None until text is first mixed in.
        self.pretraining = pretraining
        #: The last evaluation, and the best.
        self.evaluation = evaluation or EvaluationState()
        #: The running ones that scores are normalised by, by the names of their shapings.
        self.moments = dict(moments or {})
        #: Metrics that add up while an iteration is generated, by iteration, until it has been trained on.
        self.counts = defaultdict[int, Counter[str]](Counter)
        self.counts.update({at: Counter(found) for at, found in (counts or {}).items()})

    @classmethod
    def begin(cls, config: OnlineRunConfig, store: CheckpointStore, data: SourceDescription) -> OnlineState:
        """The state before the first iteration."""
        kl = config.algorithm.kl
        controller = KLController(kl.coefficient, kl.target, kl.horizon_samples)
        return cls(
            config,
            store,
            iteration=0,
            cursor=data.first_cursor,
            fingerprint=data.fingerprint,
            kl=controller,
            ledger=Ledger(),
        )

    @classmethod
    def read(cls, config: OnlineRunConfig, store: CheckpointStore, checkpoint: Path) -> OnlineState:
        """The state that a checkpoint holds, with the KL coefficient of the configuration where none is steered."""
        saved = json.loads((checkpoint / STATE_FILE).read_text())
        kl = config.algorithm.kl
        ready = set(saved["buffered"])
        state = cls(
            config,
            store,
            iteration=saved["iteration"],
            cursor=saved["cursor"],
            fingerprint=saved["data_fingerprint"],
            kl=KLController(_kl_coefficient(kl, saved), kl.target, kl.horizon_samples),
            ledger=_unfinished_requeued(checkpoint / LEDGER_FILE, ready),
            pretraining=None if (text := saved["pretraining"]) is None else TextPlace(**text),
            evaluation=EvaluationState.from_json(saved["evaluation"]),
            moments={name: RunningMoments(**numbers) for name, numbers in saved["moments"].items()},
            counts={int(at): found for at, found in saved["counts"].items()},
        )
        state.buffered = checkpoint / BUFFER_FOLDER if ready else None
        state.models = saved["models"]
        return state

    def drawn(self, info: BatchInfo) -> list[int]:
        """Take note of a batch of prompts and move the cursor past it; returns the rows that are to be answered.

        After a resume the first prompts are drawn for a second time. The ledger has kept those that were not done with;
        the others were trained on or dropped, or stand ready for training, and are passed over.
        """
        known = self.ledger.next_prompt_id
        waiting = set(self.ledger.prompts(PromptState.DRAWN))
        rows = [row for row, prompt in enumerate(info.ids) if prompt >= known or prompt in waiting]
        self._pending.append(_Drawn(self.cursor, tuple(info.ids[row] for row in rows)))
        self.ledger.draw([prompt for prompt in info.ids if prompt >= known])
        self.cursor = info.next_cursor
        return rows

    def consumed(self, prompt_ids: Sequence[int]) -> None:
        """These have been trained on, and the weights that came of it are version ``iteration + 1``.

        Raises:
            LedgerError: not all of them were drawn and scored.
        """
        self.ledger.consume(prompt_ids, policy_version=self.iteration)
        self.ledger.commit()
        in_flight = set(self.ledger.prompts(*_IN_FLIGHT))
        self._pending = [drawn for drawn in self._pending if not in_flight.isdisjoint(drawn.prompt_ids)]
        self.iteration += 1

    def adapt_kl(self, report: CreditReport) -> None:
        """Steer the KL coefficient by the batch that was last ``consumed``; without a reference there is none to steer.

        Nor is it steered while the critic warms up: it holds nothing then, and a KL of 0 says nothing of it.
        """
        if self.iteration <= self._config.algorithm.critic_warmup_iterations:
            return
        if (kl := report.metrics.get("experience/kl_per_sample")) is not None:
            self.kl = self.kl.updated(kl, self._config.online.batch_size)

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run."""
        assert self._config.run.num_iterations is not None, "launch.rules require run.num_iterations"
        return self._config.run.num_iterations

    @property
    def finished(self) -> bool:
        """The last iteration is done."""
        return self.iteration >= self.num_iterations

    def checkpoint_due(self) -> bool:
        """A checkpoint belongs after the iteration that was last done."""
        period = self._config.run.checkpoint_every
        scheduled = self.finished or bool(period and self.iteration % period == 0)
        return scheduled or self.evaluation.best_is_of(self.iteration)

    async def save(self, roles: OnlineRoles, buffer: BufferState, payloads: Sequence[Scored]) -> None:
        """Write a checkpoint: the trained roles' ranks their states, this process its own. The books must balance.

        Args:
            buffer: whole iterations that are ready to be trained on, at this moment.
            payloads: their columns.
        """
        # All of one moment: generation goes on while the roles write.
        ledger = self.ledger.to_arrow()
        ready = buffered_prompts(buffer)
        unfinished = set(self.ledger.prompts(*_IN_FLIGHT)) - ready
        waiting = [drawn for drawn in self._pending if not unfinished.isdisjoint(drawn.prompt_ids)]
        state = {
            "iteration": self.iteration,
            "cursor": waiting[0].cursor if waiting else self.cursor,
            "data_fingerprint": self.fingerprint,
            "models": self.models,
            "kl_coefficient": self.kl.coefficient,
            "kl_coefficient_begun_at": self._config.algorithm.kl.coefficient,
            "buffered": sorted(ready),
            "pretraining": None if self.pretraining is None else asdict(self.pretraining),
            "evaluation": self.evaluation.to_json(),
            "moments": {name: asdict(moments) for name, moments in self.moments.items()},
            # Those of iterations that were trained on are told with them.
            "counts": {at: dict(found) for at, found in self.counts.items() if at >= self.iteration},
        }
        best = self.evaluation.best
        with self._store.writing(self.iteration, best=None if best is None else best.iteration) as folder:
            saving = [roles.policy.call(PolicyActor.save, folder / "policy")]
            if roles.critic is not None:
                saving.append(roles.critic.call(CriticActor.save, folder / "critic"))
            await asyncio.gather(*saving)
            await keep_buffered(roles.source, buffer, payloads, folder / BUFFER_FOLDER)
            write_table(pa.Table.from_batches([ledger]), folder / LEDGER_FILE)
            (folder / STATE_FILE).write_text(json.dumps(state))
        if best is not None:
            write_best(best, self._store.of(best.iteration))


def _kl_coefficient(kl: KLConfig, saved: Mapping[str, Any]) -> float:
    """The coefficient to go on with: the one steered to, unless none is steered or steering is to begin elsewhere."""
    began_at = saved.get("kl_coefficient_begun_at", kl.coefficient)  # older checkpoints do not say
    if kl.target is None or began_at != kl.coefficient:
        return kl.coefficient
    return float(saved["kl_coefficient"])


def _unfinished_requeued(file: Path, ready: set[int]) -> Ledger:
    """The ledger of a checkpoint, with every prompt that is not ``ready`` for training back at the start of its way."""
    ledger = Ledger.from_arrow(open_table(file))
    begun = ledger.prompts(PromptState.DISPATCHED, PromptState.GENERATED, PromptState.SCORED)
    ledger.requeue([prompt for prompt in begun if prompt not in ready])
    return ledger
