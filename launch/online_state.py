"""Where an online run stands between two iterations: what its checkpoint holds beside the roles' own states."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from actors.credit import CreditReport
from actors.critic import CriticActor
from actors.policy import PolicyActor
from algorithms.kl import KLController
from experience.ledger import Ledger, PromptState
from experience.table import open_table, write_table
from launch.buffered import buffered_prompts, keep_buffered

if TYPE_CHECKING:
    from actors.source import BatchInfo, SourceDescription
    from experience.buffer import BufferState
    from launch.buffered import Scored
    from launch.checkpoint import CheckpointStore
    from launch.config import OnlineRunConfig
    from launch.roles import OnlineRoles

STATE_FILE = "state.json"
LEDGER_FILE = "ledger.arrow"
BUFFER_FOLDER = "buffer"


@dataclass(frozen=True)
class _Drawn:
    """A batch of prompts that has not been trained on: where in the data it starts, and its prompts."""

    cursor: str
    prompt_ids: tuple[int, ...]


class OnlineState:
    """The iteration, the KL coefficient, the place in the data, and the ledger.

    ``cursor`` is where the next batch of prompts is drawn from, in data of this ``fingerprint``. A checkpoint keeps the
    samples that stand ready for training, and the cursor of the first batch of prompts that does not: after a resume
    its prompts are drawn again under the same ids, and with the seeds that follow from these ids, so no prompt is
    lost and none is trained on twice.
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
    ) -> None:
        self._config = config
        self._store = store
        self._pending: deque[_Drawn] = deque()
        #: Where the samples lie that are ready for training, after a resume.
        self.buffered: Path | None = None
        self.iteration = iteration
        self.cursor = cursor
        self.fingerprint = fingerprint
        self.kl = kl
        self.ledger = ledger

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
        """The state that a checkpoint holds."""
        saved = json.loads((checkpoint / STATE_FILE).read_text())
        kl = config.algorithm.kl
        buffered = [_Drawn(drawn["cursor"], tuple(drawn["prompt_ids"])) for drawn in saved["buffered"]]
        ready = {prompt for drawn in buffered for prompt in drawn.prompt_ids}
        state = cls(
            config,
            store,
            iteration=saved["iteration"],
            cursor=saved["cursor"],
            fingerprint=saved["data_fingerprint"],
            kl=KLController(saved["kl_coefficient"], kl.target, kl.horizon_samples),
            ledger=_unfinished_requeued(checkpoint / LEDGER_FILE, ready),
        )
        state._pending.extend(buffered)
        state.buffered = checkpoint / BUFFER_FOLDER if buffered else None
        return state

    def drawn(self, info: BatchInfo) -> None:
        """Take note of a batch of prompts and move the cursor past it."""
        self._pending.append(_Drawn(self.cursor, tuple(info.ids)))
        # After a resume the first prompts are drawn for a second time; the ledger has kept them.
        self.ledger.draw([prompt for prompt in info.ids if prompt >= self.ledger.next_prompt_id])
        self.cursor = info.next_cursor

    def consumed(self, prompt_ids: Sequence[int]) -> None:
        """The oldest batch has been trained on, and the weights that came of it are version ``iteration + 1``.

        Raises:
            RuntimeError: the prompts trained on are not those of the oldest batch drawn.
        """
        oldest = self._pending.popleft()
        if tuple(prompt_ids) != oldest.prompt_ids:
            first, wanted = prompt_ids[:3], oldest.prompt_ids[:3]
            raise RuntimeError(f"trained on prompts {first}..., but {wanted}... were drawn first")
        self.ledger.consume(prompt_ids, policy_version=self.iteration)
        self.ledger.commit()
        self.iteration += 1

    def adapt_kl(self, report: CreditReport) -> None:
        """Steer the KL coefficient by the batch that was trained on; without a reference there is none to steer."""
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
        return self.finished or bool(period and self.iteration % period == 0)

    async def save(self, roles: OnlineRoles, buffer: BufferState, payloads: Sequence[Scored]) -> None:
        """Write a checkpoint: the trained roles' ranks their states, this process its own. The books must balance.

        Args:
            buffer: whole iterations that are ready to be trained on, at this moment.
            payloads: their columns.
        """
        # All of one moment: generation goes on while the roles write.
        ledger = self.ledger.to_arrow()
        ready = buffered_prompts(buffer)
        waiting = [drawn for drawn in self._pending if ready.isdisjoint(drawn.prompt_ids)]
        state = {
            "iteration": self.iteration,
            "cursor": waiting[0].cursor if waiting else self.cursor,
            "data_fingerprint": self.fingerprint,
            "kl_coefficient": self.kl.coefficient,
            "buffered": [asdict(drawn) for drawn in self._pending if not ready.isdisjoint(drawn.prompt_ids)],
        }
        with self._store.writing(self.iteration) as folder:
            saving = [roles.policy.call(PolicyActor.save, folder / "policy")]
            if roles.critic is not None:
                saving.append(roles.critic.call(CriticActor.save, folder / "critic"))
            await asyncio.gather(*saving)
            await keep_buffered(roles.source, buffer, payloads, folder / BUFFER_FOLDER)
            write_table(pa.Table.from_batches([ledger]), folder / LEDGER_FILE)
            (folder / STATE_FILE).write_text(json.dumps(state))


def _unfinished_requeued(file: Path, ready: set[int]) -> Ledger:
    """The ledger of a checkpoint, with every prompt that is not ``ready`` for training back at the start of its way."""
    ledger = Ledger.from_arrow(open_table(file))
    unfinished = ledger.prompts(PromptState.DISPATCHED, PromptState.GENERATED, PromptState.SCORED)
    ledger.requeue([prompt for prompt in unfinished if prompt not in ready])
    return ledger
