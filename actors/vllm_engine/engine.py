"""One vLLM engine whose weights can be replaced while requests are under way.

Invariants:

- Generation stands on AsyncLLM, whose callers see the death of an engine's process; the synchronous LLM hangs.
- An engine's step never meets a model whose weights are being replaced: an update is bracketed by pause and resume,
  requests under way are kept, and after a failure in the middle the engine is dead for good.
- A dead engine leaves nobody waiting: requests under way fail, and so does every later call.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from actors.config import MAX_ADAPTER_RANK, ModelConfig, RolloutConfig, SamplingConfig
from actors.errors import EngineDead, RolloutError
from actors.vllm_engine.requests import Requests
from actors.vllm_engine.worker import ADAPTER_ID, SHARED_MEMORY_BACKEND, WorkerExtension
from actors.weight_channels import Transfer

logger = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 256 << 20
#: How often a step of an update that is under way asks whether the engine's process still lives.
_DEATH_POLL_S = 0.5
#: Ranks that vLLM makes room for.
_LORA_ROOMS = (1, 8, 16, 32, 64, 128, 256, 320, MAX_ADAPTER_RANK)


@dataclass(frozen=True)
class Completion:
    """A finished response. ``versions`` are spans ``(version, start, end)`` over its tokens.

    ``num_cached_tokens`` of the prompt were not computed for it: the engine's cache held them.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    versions: list[tuple[int, int, int]]
    finish_reason: str
    num_cached_tokens: int = 0


class Engine:
    """One AsyncLLM with the policy's model."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        """Start the engine's process and load the model there.

        Raises:
            RolloutError: it cannot start, with vLLM's reason where it gave one.
        """
        try:
            self._llm = AsyncLLM.from_engine_args(args)
        except Exception as error:
            raise RolloutError(_why_not_started(args, error)) from error
        # The worker has the adapter before it is asked for, so nothing is read from its path.
        self._adapter = LoRARequest("policy", ADAPTER_ID, "sent by the policy") if args.enable_lora else None
        self._requests = Requests()
        self.is_open = False

    @property
    def max_model_tokens(self) -> int:
        """Longest prompt plus response."""
        return int(self._llm.model_config.max_model_len)

    async def generate(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> Completion:
        """One response to a prompt of token ids.

        Raises:
            EngineDead: the engine is, or died over it.
            RolloutError: vLLM does not take this prompt; the engine lives on.
        """
        inputs = {"prompt_token_ids": prompt}
        outputs = self._llm.generate(inputs, params, request_id, lora_request=self._adapter)
        final = await self._requests.last_of(outputs, "prompt")
        if (reason := final.outputs[0].finish_reason) not in ("stop", "length"):
            raise EngineDead(f"request {request_id} ended as {reason}; the engine was shut down, or is broken")
        output = final.outputs[0]
        spans = [(int(span.version), span.start, span.end) for span in output.weight_versions or ()]
        cached = final.num_cached_tokens or 0
        return Completion(output.token_ids, output.logprobs.logprobs, spans, output.finish_reason, cached)

    async def open(self, init_info: dict[str, Any]) -> None:
        """Connect with whoever sends weights, in the way of the engine's ``weight_transfer``. Before any update."""
        request = WeightTransferInitRequest(init_info=init_info)
        await self._guarded(lambda: self._llm.init_weight_transfer_engine(request))
        self.is_open = True

    async def begin_update(self) -> None:
        """Freeze generation, keeping its requests, and open the model for new weights.

        What the cache holds is dropped: requests under way are computed again with the new weights, so that every
        token's log-prob is that of the version which drew it.
        """
        await self._guarded(lambda: self._llm.pause_generation(mode="keep", clear_cache=True))
        await self._guarded(self._llm.start_weight_update)

    async def load(self, update_info: dict[str, Any]) -> None:
        """Load some weights: the fields of the transfer engine's update info."""
        request = WeightTransferUpdateRequest(update_info=update_info)
        await self._guarded(lambda: self._llm.update_weights(request))

    async def finish_update(self, version: int) -> None:
        """Put the new weights to use as ``version`` and go on generating."""
        await self._guarded(lambda: self._llm.finish_weight_update(str(version)))
        if self._adapter is not None:
            await self._guarded(lambda: self._llm.collective_rpc("use_adapter"))
        await self._guarded(self._llm.resume_generation)

    def fail_update(self, why: str) -> None:
        """Give the engine up: with part of its weights replaced it must not run again. Its requests fail."""
        self._requests.end(why)
        logger.error("%s", self._requests.death())
        self._llm.shutdown()

    def shutdown(self) -> None:
        """End the engine's processes. Requests under way fail."""
        self._requests.end("it was shut down")
        self._llm.shutdown()

    async def _guarded(self, step: Callable[[], Awaitable[object]]) -> None:
        self._requests.require_alive()
        try:
            await self._while_alive(step)
        except Exception as error:
            self.fail_update(f"an update of its weights failed: {error}")
            raise self._requests.death() from error

    async def _while_alive(self, step: Callable[[], Awaitable[object]]) -> None:
        """Await a call into the engine's process: one whose process dies meanwhile vLLM 0.32 never answers."""
        call = asyncio.ensure_future(step())
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=_DEATH_POLL_S)
                if not call.done() and self._llm.errored:
                    raise EngineDeadError
            call.result()
        finally:
            call.cancel()


def engine_args(
    config: RolloutConfig,
    model: ModelConfig,
    transfer: Transfer,
    *,
    on_gpu: bool,
    seed: int,
    adapter_rank: int | None = None,
) -> AsyncEngineArgs:
    """What vLLM is started with; ``adapter_rank`` where it runs with the policy's adapter instead of merged weights."""
    shared: dict[str, Any] = {
        "model": model.path,
        "tokenizer": model.tokenizer_path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": config.dtype or model.dtype,
        # Then the folder holds no weights; those of the policy come before the first prompt, as always.
        "load_format": "dummy" if model.from_scratch else "auto",
        "max_model_len": config.max_model_tokens,
        "max_num_seqs": config.max_concurrent_sequences,
        "tensor_parallel_size": config.tensor_parallel_size,
        "seed": seed,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "weight_transfer_config": WeightTransferConfig(
            backend=SHARED_MEMORY_BACKEND if transfer == "shared_memory" else transfer
        ),
    }
    if adapter_rank is not None:
        room = next(room for room in _LORA_ROOMS if room >= adapter_rank)
        shared |= {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": 1}
    if on_gpu:
        return AsyncEngineArgs(
            **shared,
            enforce_eager=config.enforce_eager,
            gpu_memory_utilization=config.gpu_memory_fraction,
            kv_cache_memory_bytes=config.kv_cache_bytes,
        )
    return AsyncEngineArgs(
        **shared,
        enforce_eager=True,
        kv_cache_memory_bytes=config.kv_cache_bytes or CPU_KV_CACHE_BYTES,
        # The worker runs inside the engine's process: one process less to start, 5 s less to wait.
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )


def sampling_params(sampling: SamplingConfig, seed: int) -> SamplingParams:
    """How one response is drawn. Its log-probs are of the distribution that was sampled from."""
    return SamplingParams(
        max_tokens=sampling.max_response_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        detokenize=bool(sampling.stop),
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _why_not_started(args: AsyncEngineArgs, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "max_model_len" in reason:
        # What follows in vLLM's words is a way around its check.
        reason = reason.split(" To allow overriding")[0]
        right = "lower rollout.max_model_tokens to the model's context, or leave it out"
    elif "core initialization failed" in reason:
        reason = "its process ended while it loaded the model; what it said is in this rank's log"
        right = _memory(args)
    else:
        right = "the model must be a Hugging Face folder, or a name on the hub, of a kind that vLLM knows"
    return f"the engine cannot start with the model {args.model}: {reason}; {right}"


def _memory(args: AsyncEngineArgs) -> str:
    """What the engine was to take of memory, in the configuration's words; estimated for plain attention."""
    config = args.create_engine_config()
    model, parallel = config.model_config, config.parallel_config
    per_token = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    sequence = per_token * model.dtype.itemsize * model.max_model_len
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"one sequence of {model.max_model_len} tokens takes {sequence} bytes of cache, where rollout.kv_cache_bytes "
        f"is {args.kv_cache_memory_bytes}, rollout.gpu_memory_fraction {args.gpu_memory_utilization} on a GPU, and "
        f"{free} bytes of the node's memory are free: if that does not fit, change these or rollout.max_model_tokens"
    )
