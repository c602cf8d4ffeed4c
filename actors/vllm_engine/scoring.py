"""A vLLM engine that scores: the output of a reward model's head at the last token, by vLLM's pooling runner.

Invariants:

- A score is raw: vLLM's sigmoid is off. It is read at the very last token, whatever the model's folder says of pooling.
- A row that the engine cannot take is that row's failure; an engine that died leaves nobody waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm import PoolingParams
from vllm.config import ModelConfig as VLLMModelConfig
from vllm.config import ParallelConfig, PoolerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from actors.config import ModelConfig
from actors.errors import ModelError, RolloutError
from actors.vllm_engine.engine import CPU_KV_CACHE_BYTES
from actors.vllm_engine.requests import Requests

#: Samples that one step of the engine takes at most.
_MAX_SEQUENCES = 256
#: How often it is asked whether the engine's process still lives.
_DEATH_POLL_S = 0.5
_OTHERWISE = "use --engine transformers"


class ScoringEngine:
    """One AsyncLLM with a reward model."""

    def __init__(self, config: ModelConfig, *, on_gpu: bool, max_tokens: int) -> None:
        """Start the engine. In a running loop.

        Args:
            max_tokens: of one step, and of one sample at most.

        Raises:
            ModelError: vLLM cannot score with this model, or not at its last token.
            RolloutError: the engine cannot start.
        """
        if current_platform.is_cpu() == on_gpu:
            wanted = "cuda" if on_gpu else "cpu"
            raise RolloutError(f"vLLM is installed for {current_platform.device_type}, not for --device {wanted}")
        args = _engine_args(config, on_gpu=on_gpu, max_tokens=max_tokens)
        try:
            model = args.create_model_config()
        except Exception as error:
            raise ModelError(f"vLLM cannot score with {config.path}: {_told(error)}; {_OTHERWISE}") from error
        if model.attn_type != "decoder":
            raise ModelError(
                f"vLLM runs {config.path} as {model.architecture} with attention {model.attn_type}; only a decoder is "
                f"known to be scored by its last token there: {_OTHERWISE}"
            )
        self._vocabulary = model.get_vocab_size()
        self.max_tokens = min(max_tokens, model.max_model_len)
        """Longest sample."""
        args.max_model_len = self.max_tokens
        if not on_gpu:
            args.kv_cache_memory_bytes = max(CPU_KV_CACHE_BYTES, 2 * _cache_bytes(model, self.max_tokens))
        try:
            self._llm = AsyncLLM.from_engine_args(args)
        except Exception as error:
            raise RolloutError(
                f"vLLM cannot start with the model {config.path}: {_told(error)}; what its process said stands above; "
                f"if vLLM does not take the model, {_OTHERWISE}"
            ) from error
        self._params = PoolingParams(task="classify", use_activation=False)
        self._num_asked = 0
        self._requests = Requests()

    async def score(self, row: Sequence[int]) -> float:
        """The head's output at the row's last token.

        Raises:
            EngineDead: the engine is, or died over it.
            RolloutError: vLLM does not take this row; the engine lives on.
        """
        self._requests.require_alive()
        # vLLM lets pass what its tokenizer knows and the model does not, and dies of it.
        if not 0 <= min(row) <= max(row) < self._vocabulary:
            raise RolloutError(f"tokens from {min(row)} to {max(row)}; the model knows 0 to {self._vocabulary - 1}")
        self._num_asked += 1
        inputs = {"prompt_token_ids": list(row)}
        outputs = self._llm.encode(inputs, self._params, f"score-{self._num_asked}")
        final = await self._requests.last_of(outputs, "sample")
        if final.error is not None:
            raise RolloutError(f"vLLM could not score the sample: {final.error.message}")
        return float(final.outputs.data.item())

    async def watch(self) -> NoReturn:
        """Wait for the engine's death.

        Raises:
            EngineDead: it died. Rows under way fail with the same.
        """
        while not self._llm.errored:
            await asyncio.sleep(_DEATH_POLL_S)
        self._requests.end("its process died")
        raise self._requests.death()

    def shutdown(self) -> None:
        """End the engine's processes. Rows under way fail."""
        self._requests.end("it was shut down")
        self._llm.shutdown()


def _engine_args(config: ModelConfig, *, on_gpu: bool, max_tokens: int) -> AsyncEngineArgs:
    shared: dict[str, Any] = {
        "model": config.path,
        "tokenizer": config.tokenizer_path,
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.dtype,
        "runner": "pooling",
        "pooler_config": PoolerConfig(seq_pooling_type="LAST", use_activation=False),
        "max_num_batched_tokens": max_tokens,
        "max_num_seqs": min(_MAX_SEQUENCES, max_tokens),
        "disable_log_stats": True,
    }
    if on_gpu:
        return AsyncEngineArgs(**shared)
    return AsyncEngineArgs(
        **shared,
        enforce_eager=True,
        # As for rollouts: the worker runs inside the engine's process.
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )


def _cache_bytes(model: VLLMModelConfig, num_tokens: int) -> int:
    """What one sequence takes of the cache; estimated for plain attention."""
    parallel = ParallelConfig()
    per_token = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return int(per_token * model.dtype.itemsize * num_tokens)


def _told(error: Exception) -> str:
    return " ".join(str(error).split())
