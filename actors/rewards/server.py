"""``troupe serve-reward``: a reward model as a service, by the protocol of docs/rewards.md.

Requests that come while the model is at work are scored together in the next forward passes. A sample that cannot be
scored (too long, a score that is not finite) is told so by itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from actors.config import ModelConfig
from actors.models import TokenScorer, load_scorer, load_tokenizer

logger = logging.getLogger(__name__)

LARGEST_REQUEST_BYTES = 1 << 28


class Sample(BaseModel):
    """A sample as a request has it; `columns` and what else there is are for other services."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str
    response: str
    finished: bool = True


class Request(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="ignore")

    samples: list[Sample]


class Scorer:
    """A reward model over text: its score at the last token of prompt and response, EOS behind what is finished."""

    def __init__(self, config: ModelConfig, *, device: str, max_tokens: int) -> None:
        """Load it.

        Args:
            max_tokens: of one forward pass, and so of one sample.

        Raises:
            ModelError: it cannot be loaded, or has not one label.
        """
        self._tokenizer = load_tokenizer(config)
        self._model: TokenScorer = load_scorer(config, device)
        self._device = device
        self._max_tokens = max_tokens

    def score(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """``{"score": ...}`` or ``{"error": ...}`` of each sample, in as few forward passes as they fit in."""
        rows = [self._encoded(sample) for sample in samples]
        results: list[dict[str, Any]] = [{} for _ in rows]
        pack: list[int] = []
        for place, row in enumerate(rows):
            if not 0 < len(row) <= self._max_tokens:
                results[place] = {"error": f"{len(row)} tokens; a sample has from 1 to {self._max_tokens}"}
                continue
            if sum(len(rows[other]) for other in pack) + len(row) > self._max_tokens:
                self._forward(rows, pack, results)
                pack = []
            pack.append(place)
        self._forward(rows, pack, results)
        return results

    def _encoded(self, sample: Sample) -> list[int]:
        tokenizer, text = self._tokenizer, sample.prompt + sample.response
        # A prompt may bring its own BOS, written out.
        brings_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(text, add_special_tokens=not brings_bos)["input_ids"]
        if sample.finished and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return ids

    @torch.no_grad()
    def _forward(self, rows: Sequence[list[int]], pack: Sequence[int], results: list[dict[str, Any]]) -> None:
        if not pack:
            return
        tokens_T = torch.tensor([token for place in pack for token in rows[place]], device=self._device)
        positions_T = torch.cat([torch.arange(len(rows[place])) for place in pack]).to(self._device)
        last_S = torch.tensor([len(rows[place]) for place in pack]).cumsum(0) - 1
        scores: list[float] = self._model(tokens_T, positions_T, last_S.to(self._device)).float().tolist()
        for place, score in zip(pack, scores, strict=True):
            results[place] = {"score": score} if math.isfinite(score) else {"error": f"the score is {score}"}


class Service:
    """The web application over a scorer."""

    def __init__(self, scorer: Scorer, name: str) -> None:
        self._scorer = scorer
        self._name = name
        self._waiting: list[tuple[list[Sample], asyncio.Future[list[dict[str, Any]]]]] = []
        self._arrived = asyncio.Event()

    def application(self) -> web.Application:
        """``POST /score`` and ``GET /health``."""
        application = web.Application(client_max_size=LARGEST_REQUEST_BYTES)
        application.add_routes([web.post("/score", self._score), web.get("/health", self._health)])
        application.cleanup_ctx.append(self._working)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        num_waiting = sum(len(samples) for samples, _ in self._waiting)
        return web.json_response({"status": "ok", "model": self._name, "num_waiting": num_waiting})

    async def _score(self, request: web.Request) -> web.Response:
        try:
            samples = Request.model_validate(json.loads(await request.read())).samples
        except (ValueError, ValidationError) as error:
            return web.json_response({"error": f"not a request of the protocol: {error}"}, status=400)
        if not samples:
            return web.json_response({"results": []})
        answer: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((samples, answer))
        self._arrived.set()
        return web.json_response({"results": await answer})

    async def _working(self, _: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._work())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _work(self) -> None:
        """Score whatever waits, all of it at a time."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            taken, self._waiting = self._waiting, []
            together = [sample for samples, _ in taken for sample in samples]
            try:
                results = await asyncio.to_thread(self._scorer.score, together)
            except Exception as error:
                # A model's code raises whatever it likes (out of memory, for one): the service lives on.
                logger.exception("%d samples could not be scored", len(together))
                results = [{"error": f"{type(error).__name__}: {error}"}] * len(together)
            start = 0
            for samples, answer in taken:
                if not answer.done():  # a client that went away
                    answer.set_result(results[start : start + len(samples)])
                start += len(samples)


def serve(config: ModelConfig, *, host: str, port: int, device: str, max_tokens: int) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ModelError: the model cannot be loaded.
        OSError: the address is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    scorer = Scorer(config, device=device, max_tokens=max_tokens)

    async def application() -> web.Application:
        return Service(scorer, config.path).application()

    logger.info("%s is served at http://%s:%d", config.path, host, port)
    web.run_app(application(), host=host, port=port, print=None)
