"""A vLLM engine that judges: its weights stay as they are, and it tells the probabilities of given tokens.

Invariant: a question that the engine cannot take is that question's failure; an engine that died is the role's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from actors.errors import RolloutError
from actors.rewards.config import JudgeRewardConfig
from actors.vllm_engine.engine import CPU_KV_CACHE_BYTES
from actors.vllm_engine.requests import Requests


@dataclass(frozen=True)
class Judgement:
    """What the judge said: its ``text``, and log-probs of the tokens that were asked for, at its first token."""

    text: str
    logprobs: dict[int, float]


class JudgeEngine:
    """One AsyncLLM with the judge's model."""

    def __init__(self, config: JudgeRewardConfig, *, on_gpu: bool, seed: int) -> None:
        """Start the engine. In a running loop.

        Raises:
            RolloutError: it cannot start.
        """
        self._seed = seed
        self._num_asked = 0
        self._requests = Requests()
        try:
            self._llm = AsyncLLM.from_engine_args(_engine_args(config, on_gpu=on_gpu, seed=seed))
        except Exception as error:
            why = " ".join(str(error).split())
            raise RolloutError(f"the judge's engine cannot start with the model {config.model.path}: {why}") from error

    async def probabilities(self, question: Sequence[int], tokens: Sequence[int]) -> Judgement:
        """Log-probs of ``tokens`` to be the first of the answer, over the whole vocabulary.

        Raises:
            EngineDead: the engine is, or died over it.
            RolloutError: vLLM does not take the question.
        """
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(tokens),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._answered(question, params)
        first = (output.logprobs or [{}])[0]
        return Judgement(output.text, {token: first[token].logprob for token in tokens if token in first})

    async def answer(
        self, question: Sequence[int], *, max_tokens: int, temperature: float, attempt: int = 0
    ) -> Judgement:
        """What the judge writes. Raises as ``probabilities``.

        Args:
            attempt: how often it has been asked the same before; another attempt draws other tokens.
        """
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=self._seed + attempt,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return Judgement((await self._answered(question, params)).text, {})

    def shutdown(self) -> None:
        """End the engine's processes. Questions under way fail."""
        self._requests.end("it was shut down")
        self._llm.shutdown()

    async def _answered(self, question: Sequence[int], params: SamplingParams) -> Any:
        self._num_asked += 1
        inputs = {"prompt_token_ids": list(question)}
        outputs = self._llm.generate(inputs, params, f"judge-{self._num_asked}")
        return (await self._requests.last_of(outputs, "question")).outputs[0]


def _engine_args(config: JudgeRewardConfig, *, on_gpu: bool, seed: int) -> AsyncEngineArgs:
    shared: dict[str, Any] = {
        "model": config.model.path,
        "tokenizer": config.model.tokenizer_path,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": config.model.dtype,
        "max_model_len": config.max_model_tokens,
        "max_num_seqs": config.max_concurrent_sequences,
        "seed": seed,
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
    }
    if on_gpu:
        return AsyncEngineArgs(
            **shared,
            gpu_memory_utilization=config.gpu_memory_fraction,
            kv_cache_memory_bytes=config.kv_cache_bytes,
        )
    return AsyncEngineArgs(
        **shared,
        enforce_eager=True,
        kv_cache_memory_bytes=config.kv_cache_bytes or CPU_KV_CACHE_BYTES,
        # As for rollouts: the worker runs inside the engine's process.
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )
