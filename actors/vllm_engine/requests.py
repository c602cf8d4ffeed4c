"""The requests that a vLLM engine is answering.

Invariant: none outlives its engine. vLLM leaves some of them waiting for ever when its process ends; here they fail,
and so does every later one, with the first reason that was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from vllm.exceptions import VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from actors.errors import EngineDead, RolloutError

Output = TypeVar("Output")


class Requests:
    """Those under way at one engine, and what it died of."""

    def __init__(self) -> None:
        self._dead: str | None = None
        self._answering: set[asyncio.Task[Any]] = set()

    async def last_of(self, outputs: AsyncGenerator[Output, None], what: str) -> Output:
        """The last output of a request for ``what``.

        Raises:
            EngineDead: the engine is, or died over it.
            RolloutError: vLLM does not take ``what``; the engine lives on.
        """
        self.require_alive()
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._answering.add(task)
        final: Output | None = None
        try:
            async for output in outputs:
                final = output
        except EngineDeadError as error:
            self._dead = self._dead or f"its process died: {error}"
            raise self.death() from error
        except VLLMClientError as error:
            raise RolloutError(f"vLLM does not take the {what}: {error}") from error
        except asyncio.CancelledError:
            self.require_alive()
            raise
        finally:
            self._answering.discard(task)
        if final is None:
            raise EngineDead(f"the engine gave no output for the {what}; it was shut down, or is broken")
        return final

    def end(self, why: str) -> None:
        """The engine is dead: requests under way fail. A reason that was given before stays."""
        self._dead = self._dead or why
        for task in self._answering:
            task.cancel()

    def require_alive(self) -> None:
        """Raises:
        EngineDead: the engine is.
        """
        if self._dead is not None:
            raise self.death()

    def death(self) -> EngineDead:
        """The error that tells what the engine died of."""
        return EngineDead(f"the engine is dead: {self._dead}")
