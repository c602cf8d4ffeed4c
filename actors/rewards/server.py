"""``troupe serve-reward``: a reward model as a service, by the protocol of docs/rewards.md.

Invariant: a server that can score no more says so to those who wait (status 503, which they send again elsewhere) and
ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from actors.config import ModelConfig
from actors.errors import EngineDead
from actors.rewards.scorers import Sample, Scorer, TransformersScorer, VLLMScorer

logger = logging.getLogger(__name__)

#: What a model may be served with, by the names of ``--engine``.
SCORERS: dict[str, Callable[..., Scorer]] = {"transformers": TransformersScorer, "vllm": VLLMScorer}
LARGEST_REQUEST_BYTES = 1 << 28


class Request(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="ignore")

    samples: list[Sample]


class Service:
    """The web application over a scorer."""

    def __init__(self, scorer: Scorer, name: str) -> None:
        self._scorer = scorer
        self._name = name
        self.failure: BaseException | None = None
        """Why it ended, where nobody asked it to."""

    def application(self) -> web.Application:
        """``POST /score`` and ``GET /health``."""
        application = web.Application(client_max_size=LARGEST_REQUEST_BYTES)
        application.add_routes([web.post("/score", self._score), web.get("/health", self._health)])
        application.cleanup_ctx.append(self._working)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        if self.failure is not None:
            return web.json_response({"error": str(self.failure)}, status=503)
        return web.json_response({"status": "ok", "model": self._name, "num_waiting": self._scorer.num_waiting})

    async def _score(self, request: web.Request) -> web.Response:
        try:
            samples = Request.model_validate(json.loads(await request.read())).samples
        except (ValueError, ValidationError) as error:
            return web.json_response({"error": f"not a request of the protocol: {error}"}, status=400)
        if not samples:
            return web.json_response({"results": []})
        try:
            return web.json_response({"results": await self._scorer.score(samples)})
        except EngineDead as error:
            return web.json_response({"error": str(error)}, status=503)

    async def _working(self, _: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._scorer.work())
        task.add_done_callback(self._ended)
        yield
        task.cancel()
        await asyncio.wait({task})
        self._scorer.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.failure = task.exception()
            # As a signal would: those who wait are answered, and the server ends.
            raise web.GracefulExit


def serve(config: ModelConfig, *, engine: str, host: str, port: int, device: str, max_tokens: int) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        engine: one of ``SCORERS``.

    Raises:
        ModelError: the model cannot be loaded, or not by this engine.
        RolloutError: vLLM cannot start.
        EngineDead: vLLM's process died; the server has ended.
        OSError: the address is taken.
        ValueError: there is no such engine.
    """
    if engine not in SCORERS:
        raise ValueError(f"engine {engine!r} is not known: {' or '.join(SCORERS)} is expected")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    services: list[Service] = []

    async def application() -> web.Application:
        # Here, because vLLM wants a loop that runs.
        services.append(Service(SCORERS[engine](config, device=device, max_tokens=max_tokens), config.path))
        logger.info("%s is served at http://%s:%d", config.path, host, port)
        return services[0].application()

    web.run_app(application(), host=host, port=port, print=None)
    if services and services[0].failure is not None:
        raise services[0].failure
