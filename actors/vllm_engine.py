"""vLLM: the only module that imports it. It is imported in the processes that run an engine, and in no other.

Invariants:

- Generation stands on AsyncLLM, whose callers see the death of an engine's process; the synchronous LLM hangs.
- An engine's step never meets a model whose weights are being replaced: an update is bracketed by pause and resume,
  requests under way are kept, and after a failure in the middle the engine is dead for good.
- On CPU two defects of vLLM are mended here: ``_rebuild_tied_head`` and ``_keep_generators``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferInitRequest,
    WeightTransferUpdateInfo,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from actors.config import ModelConfig, RolloutConfig, SamplingConfig
from actors.errors import RoleError
from actors.weights import WeightBucket, WeightEntry, WeightsRefused, digest_of, map_segment, unpack

logger = logging.getLogger(__name__)

SHARED_MEMORY_BACKEND = "troupe_shared_memory"
CPU_KV_CACHE_BYTES = 256 << 20


class EngineDead(RoleError):
    """The engine cannot generate any more: its process died, or an update failed half way."""


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing is to be agreed on before an update."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket: the segment it stands in, its size, its digest, and a row for each parameter."""

    path: str
    num_bytes: int
    digest: str
    entries: list[tuple[str, str, list[int], int, int]]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """The worker's end of the wire on CPU: loads buckets out of a shared-memory segment."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._expected: set[str] = set()
        self._loaded: set[str] = set()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to agree on."""

    def start_weight_update(self) -> None:
        """Make room for new weights; from here until ``finish_weight_update`` the model cannot run."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._expected = {name for name, _ in self.model.named_parameters()}
        self._loaded = set()
        initialize_layerwise_reload(self.model)

    @torch.no_grad()
    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load one bucket.

        Raises:
            WeightsRefused: its bytes are not those that were sent.
        """
        payload = map_segment(update_info.path, update_info.num_bytes)
        digest = digest_of(payload.numpy())
        if digest != update_info.digest:
            raise WeightsRefused(f"a bucket of weights has digest {digest}, it was sent with {update_info.digest}")
        entries = [WeightEntry(name, dtype, tuple(shape), *place) for name, dtype, shape, *place in update_info.entries]
        self._loaded |= set(self.model.load_weights(unpack(payload, entries)) or ())

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Put the new weights to use.

        Raises:
            WeightsRefused: some of the model's parameters did not come.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if missing := sorted(self._expected - self._loaded):
            raise WeightsRefused(f"{len(missing)} of the model's parameters did not come, {missing[0]} among them")
        finalize_layerwise_reload(self.model, self.model_config)
        self._rebuild_tied_head()

    def _rebuild_tied_head(self) -> None:
        """Pack the output head again where it is the embedding.

        On CPU vLLM 0.32 multiplies by a packed copy of the head. A reload replaces the embedding and not the copy, so
        with tied weights the logits would go on being the old ones, without an error.
        """
        if self.device.type != "cpu":
            return
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class WorkerExtension:
    """Named as vLLM's worker extension, so that this module is imported in the worker's process.

    That import registers the engine above and mends the sampler: the worker builds both before it can be called.
    """


def _keep_generators(runner: Any) -> None:
    """Let requests with a seed of their own be prefilled in parts on CPU.

    A request whose prompt is not done yet (chunked prefill, or recomputed after a pause) samples a token that is
    thrown away, and its generator must be wound back. vLLM 0.32 does so by a generator's offset, which only CUDA's
    have, and the engine dies. Here the state of such generators is saved before sampling and restored after it.
    """
    sample, bookkeeping = runner._sample, runner._bookkeeping_sync

    def thrown_away(self: Any) -> list[int]:
        rows = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        return [row for row in rows if row in self.input_batch.generators]

    @functools.wraps(sample)
    def sample_and_wind_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        states = {row: generators[row].get_state() for row in thrown_away(self)}
        output = sample(self, *args, **kwargs)
        for row, state in states.items():
            generators[row].set_state(state)
        return output

    @functools.wraps(bookkeeping)
    def bookkeeping_without_offsets(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = {row: generators.pop(row) for row in thrown_away(self)}
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = sample_and_wind_back, bookkeeping_without_offsets


def _prepare_worker() -> None:
    if SHARED_MEMORY_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(SHARED_MEMORY_BACKEND, SharedMemoryEngine)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        if not hasattr(CPUModelRunner._sample, "__wrapped__"):
            _keep_generators(CPUModelRunner)


# At import, because importing this module is all that vLLM does for an extension before it builds the worker.
_prepare_worker()


@dataclass(frozen=True)
class Completion:
    """A finished response. ``versions`` are spans ``(version, start, end)`` over its tokens."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[tuple[int, int, int]]
    finish_reason: str


class Engine:
    """One AsyncLLM with the policy's model, whose weights can be replaced."""

    def __init__(self, config: RolloutConfig, model: ModelConfig, *, on_gpu: bool, seed: int) -> None:
        self._llm = AsyncLLM.from_engine_args(engine_args(config, model, on_gpu=on_gpu, seed=seed))
        self._opened = False
        self._dead: str | None = None

    @property
    def max_model_tokens(self) -> int:
        """Longest prompt plus response."""
        return int(self._llm.model_config.max_model_len)

    async def generate(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> Completion:
        """One response to a prompt of token ids.

        Raises:
            EngineDead: the engine is, or died over it.
        """
        self._require_alive()
        final = None
        try:
            async for output in self._llm.generate({"prompt_token_ids": list(prompt)}, params, request_id):
                final = output
        except EngineDeadError as error:
            self._dead = f"its process died: {error}"
            raise EngineDead(f"the engine is dead: {self._dead}") from error
        if final is None:
            raise EngineDead(f"request {request_id} ended without an output")
        output = final.outputs[0]
        spans = [(int(span.version), span.start, span.end) for span in output.weight_versions or ()]
        return Completion(list(output.token_ids), list(output.logprobs.logprobs), spans, str(output.finish_reason))

    async def begin_update(self) -> None:
        """Freeze generation, keeping its requests, and open the model for new weights.

        What the cache holds is dropped: requests under way are computed again with the new weights, so that every
        token's log-prob is that of the version which drew it.
        """
        await self._guarded(self._begin_update)

    async def _begin_update(self) -> None:
        if not self._opened:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            self._opened = True
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.start_weight_update()

    async def load(self, bucket: WeightBucket, segment_path: str) -> None:
        """Load a bucket that stands in a shared-memory segment."""
        info = {
            "path": segment_path,
            "num_bytes": bucket.payload.nbytes,
            "digest": bucket.digest,
            "entries": [
                (entry.name, entry.dtype, list(entry.shape), entry.offset, entry.num_bytes) for entry in bucket.entries
            ],
        }
        await self._guarded(lambda: self._llm.update_weights(WeightTransferUpdateRequest(update_info=info)))

    async def finish_update(self, version: int) -> None:
        """Put the new weights to use as ``version`` and go on generating."""
        await self._guarded(lambda: self._llm.finish_weight_update(str(version)))
        await self._guarded(self._llm.resume_generation)

    async def fail_update(self, why: str) -> None:
        """Give the engine up: with part of its weights replaced it must not run again. Its requests fail."""
        self._dead = self._dead or why
        self._llm.shutdown()

    async def _guarded(self, step: Callable[[], Any]) -> None:
        self._require_alive()
        try:
            await step()
        except Exception as error:
            await self.fail_update(f"an update of its weights failed: {error}")
            raise EngineDead(f"the engine is dead: {self._dead}") from error

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(f"the engine is dead: {self._dead}")

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()


def engine_args(config: RolloutConfig, model: ModelConfig, *, on_gpu: bool, seed: int) -> AsyncEngineArgs:
    """What vLLM is started with."""
    shared: dict[str, Any] = {
        "model": model.path,
        "tokenizer": model.tokenizer_path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": config.dtype or model.dtype,
        "max_model_len": config.max_model_tokens,
        "max_num_seqs": config.max_concurrent_sequences,
        "tensor_parallel_size": config.tensor_parallel_size,
        "seed": seed,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "weight_transfer_config": WeightTransferConfig(backend=SHARED_MEMORY_BACKEND),
    }
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
