"""A Python function as a reward.

A plain function runs in processes of its own, where one that hangs is killed and one that crashes takes nothing with
it. A coroutine function runs here, many calls at a time: it must not block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.rewards.binding import Signature, is_async, load_function
from actors.rewards.config import FunctionRewardConfig
from actors.rewards.face import JSON, Answer, Reason, RewardFailure, RewardSample, TextReward, checked, checked_batch
from actors.rewards.workers import WorkerPool


class FunctionReward(TextReward):
    """A function by its path.

    Raises:
        RewardError: it cannot be loaded, or its parameters cannot be filled.
    """

    def __init__(self, config: FunctionRewardConfig) -> None:
        self._config = config
        self.samples_per_call = config.batch_size if config.batched else 1
        self._function = load_function(config.path)
        self._signature = Signature.of(self._function)
        self._slots = asyncio.Semaphore(config.num_concurrent)
        self._pool: WorkerPool | None = None
        if not is_async(self._function):
            task: dict[str, JSON] = {"path": config.path, "batched": config.batched}
            self._pool = WorkerPool(task, num_workers=config.num_workers, timeout_s=config.timeout_s)

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """One answer for each sample; a call that takes longer than ``timeout_s`` is one that failed.

        Raises:
            RewardError: the function asks for a column that the samples do not have.
        """
        size = self.samples_per_call
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        call = self._pool.call if self._pool is not None else self._here
        answers = await asyncio.gather(*(call(part) for part in parts))
        return [answer for part in answers for answer in part]

    async def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            await self._pool.close()

    async def _here(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """Await the coroutine function."""
        given = [vars(sample) for sample in samples]
        batched = self._config.batched
        arguments = self._signature.bind_batch(given) if batched else self._signature.bind(given[0])
        async with self._slots:
            try:
                value = await asyncio.wait_for(self._function(**arguments), self._config.timeout_s)
            except TimeoutError:
                return [RewardFailure(Reason.TIMED_OUT, f"no answer in {self._config.timeout_s} s")] * len(samples)
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise  # it is this call that is to end, and not something that the function waited for
                return [RewardFailure(Reason.RAISED, "CancelledError")] * len(samples)
            except Exception as error:  # user code raises whatever it likes
                return [RewardFailure(Reason.RAISED, f"{type(error).__name__}: {error}")] * len(samples)
        return checked_batch(value, len(samples)) if batched else [checked(value)]
