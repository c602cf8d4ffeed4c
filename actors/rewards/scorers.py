"""What ``troupe serve-reward`` scores with: Transformers in its own process, or vLLM's pooling engine beside it.

Invariants, for both:

- A sample is scored at the last token of its prompt and response, EOS behind what is finished, and the score is what
  the head gives there: no activation, and what normalisation has put beside the head is added.
- A sample that cannot be scored (too long, a score that is not finite) is told so by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from actors.config import ModelConfig
from actors.errors import EngineDead, ModelError, RolloutError
from actors.models import TokenScorer, explained, load_scorer, load_tokenizer, outline
from actors.rollout import engine_environment

if TYPE_CHECKING:
    from actors.vllm_engine.scoring import ScoringEngine

logger = logging.getLogger(__name__)

#: ``{"score": ...}`` or ``{"error": ...}``, as an answer has it.
Result = dict[str, Any]


class Sample(BaseModel):
    """A sample as a request has it; `columns` and what else there is are for other services."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str
    response: str
    finished: bool = True


class Scorer(Protocol):
    """A reward model over text."""

    @property
    def num_waiting(self) -> int:
        """Samples that wait for their turn."""

    async def score(self, samples: Sequence[Sample]) -> list[Result]:
        """One result for each sample, in their order.

        Raises:
            EngineDead: nothing can be scored any more.
        """

    async def work(self) -> None:
        """What has to go on beside requests; it ends only by being cancelled, or with what is wrong.

        Raises:
            EngineDead: nothing can be scored any more.
        """

    def close(self) -> None:
        """End its processes."""


class Encoder:
    """Samples as token ids, from 1 to ``max_tokens`` of them."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def __call__(self, sample: Sample) -> list[int]:
        """The sample's tokens, EOS behind a finished one, however many there are."""
        tokenizer, text = self._tokenizer, sample.prompt + sample.response
        # A prompt may bring its own BOS, written out.
        brings_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(text, add_special_tokens=not brings_bos)["input_ids"]
        if sample.finished and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return ids

    def refusal(self, row: Sequence[int]) -> Result | None:
        """What is told of a row that has too many tokens, or none."""
        if 0 < len(row) <= self._max_tokens:
            return None
        return {"error": f"{len(row)} tokens; a sample has from 1 to {self._max_tokens}"}


class TransformersScorer:
    """The model in this process. Requests that come while it is at work are scored together in the next passes."""

    def __init__(self, config: ModelConfig, *, device: str, max_tokens: int) -> None:
        """Load it.

        Args:
            max_tokens: of one forward pass, and so of one sample.

        Raises:
            ModelError: it cannot be loaded, or has not one label.
        """
        self._encoder = Encoder(load_tokenizer(config), max_tokens)
        require_head(config)
        self._model: TokenScorer = load_scorer(config, device)
        self._device = device
        self._max_tokens = max_tokens
        self._waiting: list[tuple[Sequence[Sample], asyncio.Future[list[Result]]]] = []
        self._arrived = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """Samples that the next forward passes will take."""
        return sum(len(samples) for samples, _ in self._waiting)

    async def score(self, samples: Sequence[Sample]) -> list[Result]:
        """The samples' results, once their turn has come."""
        answer: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((samples, answer))
        self._arrived.set()
        return await answer

    async def work(self) -> None:
        """Score whatever waits, all of it at a time."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            taken, self._waiting = self._waiting, []
            together = [sample for samples, _ in taken for sample in samples]
            try:
                results = await asyncio.to_thread(self.scored, together)
            except Exception as error:
                # A model's code raises whatever it likes (out of memory, for one): the service lives on.
                logger.exception("%d samples could not be scored", len(together))
                results = [{"error": f"{type(error).__name__}: {error}"}] * len(together)
            start = 0
            for samples, answer in taken:
                if not answer.done():  # a client that went away
                    answer.set_result(results[start : start + len(samples)])
                start += len(samples)

    def scored(self, samples: Sequence[Sample]) -> list[Result]:
        """Results of all samples, in as few forward passes as they fit in."""
        rows = [self._encoder(sample) for sample in samples]
        results: list[Result] = [{} for _ in rows]
        pack: list[int] = []
        for place, row in enumerate(rows):
            if (refusal := self._encoder.refusal(row)) is not None:
                results[place] = refusal
                continue
            if sum(len(rows[other]) for other in pack) + len(row) > self._max_tokens:
                self._forward(rows, pack, results)
                pack = []
            pack.append(place)
        self._forward(rows, pack, results)
        return results

    def close(self) -> None:
        """Nothing: there is no process besides this one."""

    @torch.no_grad()
    def _forward(self, rows: Sequence[list[int]], pack: Sequence[int], results: list[Result]) -> None:
        if not pack:
            return
        tokens_T = torch.tensor([token for place in pack for token in rows[place]], device=self._device)
        positions_T = torch.cat([torch.arange(len(rows[place])) for place in pack]).to(self._device)
        last_S = torch.tensor([len(rows[place]) for place in pack]).cumsum(0) - 1
        scores: list[float] = self._model(tokens_T, positions_T, last_S.to(self._device)).float().tolist()
        for place, score in zip(pack, scores, strict=True):
            results[place] = _result(score)


class VLLMScorer:
    """The model on a vLLM engine, which decides how many samples run at a time: no request waits for another's end."""

    def __init__(self, config: ModelConfig, *, device: str, max_tokens: int) -> None:
        """Start the engine. In a running loop.

        Args:
            max_tokens: of one step of the engine, and of one sample at most; the model's context may allow less.

        Raises:
            ModelError: vLLM cannot score with this model.
            RolloutError: the engine cannot start.
        """
        self._bias = require_poolable(config)
        if device not in ("cpu", "cuda"):
            raise RolloutError(f"--device {device}: vLLM takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES")
        tokenizer = load_tokenizer(config)
        on_gpu = device == "cuda"
        # vLLM reads it when it is imported, and its engine's process inherits it.
        for name, value in engine_environment(on_gpu).items():
            os.environ.setdefault(name, value)
        # Here, so that whoever names this class does not import vLLM.
        from actors.vllm_engine.scoring import ScoringEngine

        self._engine: ScoringEngine = ScoringEngine(config, on_gpu=on_gpu, max_tokens=max_tokens)
        self._encoder = Encoder(tokenizer, self._engine.max_tokens)
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        """Samples that have no score yet."""
        return self._num_waiting

    async def score(self, samples: Sequence[Sample]) -> list[Result]:
        """The samples' results. Tokenizing goes on beside the loop, for it takes its time.

        Raises:
            EngineDead: the engine is.
        """
        self._num_waiting += len(samples)
        try:
            rows = await asyncio.to_thread(lambda: [self._encoder(sample) for sample in samples])
            return list(await asyncio.gather(*(self._scored(row) for row in rows)))
        finally:
            self._num_waiting -= len(samples)

    async def work(self) -> None:
        """Watch the engine.

        Raises:
            EngineDead: it died.
        """
        await self._engine.watch()

    def close(self) -> None:
        """End the engine, for good."""
        self._engine.shutdown()

    async def _scored(self, row: Sequence[int]) -> Result:
        if (refusal := self._encoder.refusal(row)) is not None:
            return refusal
        try:
            return _result(await self._engine.score(row) + self._bias)
        except EngineDead:
            raise
        except RolloutError as error:
            return {"error": str(error)}


def require_head(config: ModelConfig) -> str:
    """The architecture of a model that has a head to score with.

    Raises:
        ModelError: it has none. ``load_scorer`` would give it one that is all zeros, and so would be all scores.
    """
    try:
        found = transformers.AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"config.json of model {config.path} could not be read: {explained(error)}") from error
    architecture = str((found.architectures or ["unknown"])[0])
    if not architecture.endswith("Classification"):
        raise ModelError(
            f"{config.path} is no reward model: its architecture is {architecture}, and one that ends in "
            "ForSequenceClassification is expected"
        )
    return architecture


def require_poolable(config: ModelConfig) -> float:
    """What is to be added to the scores that vLLM gives with this model, whose folder looks as if vLLM could.

    Raises:
        ModelError: it has not one label, or not the head that vLLM's pooling puts to use.
    """
    # vLLM brings its own attention; with Transformers' default some models are refused.
    model = outline(config.model_copy(update={"attention": "eager"}), scores=True)
    architecture = require_head(config)
    assert isinstance(model, TokenScorer), "asked for one that scores"
    if not architecture.endswith("ForSequenceClassification") or model.head_name != "score":
        raise ModelError(
            f"{config.path} is a {architecture} with its head in {model.head_name!r}; vLLM scores with a "
            "...ForSequenceClassification that has it in 'score': use --engine transformers"
        )
    return model.score_bias


def _result(score: float) -> Result:
    return {"score": score} if math.isfinite(score) else {"error": f"the score is {score}"}
