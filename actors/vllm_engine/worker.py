"""What runs in the worker's process of an engine: the receiving end of the wire on CPU, and two defects mended.

An adapter arrives over the same wire as the weights, under PEFT's names, and is put into vLLM's own LoRA layers from
memory. It has one id for good, under which it is put in anew at each update, so that requests under way go on with the
new one as they do with new weights.

vLLM imports this module before it builds the worker, because ``WorkerExtension`` is named in its arguments. The mends
stand on private names of vLLM 0.32; where a later vLLM lacks them the engine does not start, and says which.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from actors.weights import ADAPTER_PREFIX, WeightBucket, WeightEntry, WeightsRefused, digest_of, map_segment, unpack

#: What ``rollout.weight_transfer`` is called among vLLM's engines.
SHARED_MEMORY_BACKEND = "troupe_shared_memory"
#: What the policy's adapter is called among vLLM's, of which it is the only one.
ADAPTER_ID = 1


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):  # type: ignore[misc]  # untyped in vLLM
    """Nothing is to be agreed on before an update."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # untyped in vLLM
    """One bucket: the segment it stands in, its size, its digest, and a row for each parameter."""

    path: str
    num_bytes: int
    digest: str
    entries: list[tuple[str, str, list[int], int, int]]


def shared_memory_update(bucket: WeightBucket, segment_path: str) -> dict[str, Any]:
    """The fields of the ``SharedMemoryUpdate`` of a bucket that stands in a segment, as plain values."""
    return {
        "path": segment_path,
        "num_bytes": bucket.payload.nbytes,
        "digest": bucket.digest,
        "entries": [
            (entry.name, entry.dtype, list(entry.shape), entry.offset, entry.num_bytes) for entry in bucket.entries
        ],
    }


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):  # type: ignore[misc]  # untyped in vLLM
    """The worker's end of the wire on CPU: loads buckets out of a shared-memory segment."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._expected: set[str] = set()
        self._loaded: set[str] = set()
        self._reloading = False
        self._adapter: dict[str, torch.Tensor] = {}

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to agree on."""

    def start_weight_update(self) -> None:
        """Make ready for new weights, for a new adapter, or for both."""
        self._expected, self._loaded, self._adapter = set(), set(), {}
        self._reloading = False

    def _begin_reload(self) -> None:
        """Make room for new weights; from here until ``finish_weight_update`` the model cannot run."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with _adapted_layers_bare(self.model):
            self._expected = {name for name, _ in self.model.named_parameters()}
            self._forget_packed_experts()
            initialize_layerwise_reload(self.model)
        self._reloading = True

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
        weights = []
        for name, tensor in unpack(payload, entries):
            if name.startswith(ADAPTER_PREFIX):
                self._adapter[name] = tensor
            else:
                weights.append((name, tensor))
        if weights:
            if not self._reloading:
                self._begin_reload()
            with _adapted_layers_bare(self.model):
                self._loaded |= set(self.model.load_weights(weights) or ())

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Put the new weights to use.

        Raises:
            WeightsRefused: some of the model's parameters did not come, or nothing did.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if not self._reloading:
            if not self._adapter:
                raise WeightsRefused("an update brought neither weights nor an adapter")
            return
        if missing := sorted(self._expected - self._loaded):
            raise WeightsRefused(f"{len(missing)} of the model's parameters did not come, {missing[0]} among them")
        if partial := self._partly_loaded():
            raise WeightsRefused(f"{len(partial)} of the model's layers came in part only, {partial[0]} among them")
        with _adapted_layers_bare(self.model):
            finalize_layerwise_reload(self.model, self.model_config)
            self._rebuild_tied_head()
        self._reloading = False

    def use_adapter(self) -> None:
        """Put the adapter that came into vLLM's LoRA layers, in place of the one before.

        Apart from ``finish_weight_update``, after which vLLM takes every adapter out.

        Raises:
            WeightsRefused: none came, or it is for layers that vLLM cannot adapt.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        if not self._adapter:
            raise WeightsRefused("the engine runs with an adapter, and none came")
        rank = next(len(tensor) for name, tensor in self._adapter.items() if ".lora_A." in name)
        manager, mapper = self.model.lora_manager, getattr(self.model, "hf_to_vllm_mapper", None)
        # B comes with the scale in it, so alpha is the rank.
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            self._adapter,
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        # Any other name vLLM would leave out without a word.
        known = set(manager.modules).union(*manager.packed_modules.values())
        if unknown := sorted(set(adapter.loras) - known):
            raise WeightsRefused(
                f"vLLM cannot adapt {len(unknown)} of the layers, {unknown[0]} among them: set rollout.lora to merged, "
                "or leave them out of tuning.lora.targets"
            )
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapter)
        manager.activate_adapter(ADAPTER_ID)
        self._adapter = {}

    def _forget_packed_experts(self) -> None:
        """Have the experts of a mixture packed again.

        On CPU vLLM 0.32 packs them when their kernel is made, and a reload keeps the kernel: it would go on reading
        weights that are not packed as if they were, without an error.
        """
        if self.device.type == "cpu":
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None

    def _partly_loaded(self) -> list[str]:
        """Layers of which some elements came and others did not.

        vLLM stacks parameters (query, key and value; gate and up), and reports a stack as loaded when any part of it
        is; the rest would be memory as it was found.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        partial = []
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)  # of a layer that is whole, it is already empty again
            padded = isinstance(layer, VocabParallelEmbedding)  # one parameter, whose padding never comes
            if not padded and 0 < info.load_numel < (info.load_numel_total or 0):
                partial.append(name)
        return partial

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

    weight_transfer_engine: Any

    def use_adapter(self) -> None:
        """See ``SharedMemoryEngine.use_adapter``."""
        self.weight_transfer_engine.use_adapter()


@contextmanager
def _adapted_layers_bare(model: Any) -> Iterator[None]:
    """Inside, no layer of ``model`` is wrapped in one of vLLM's LoRA layers, so that all have their usual names."""
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped = [
        (name, layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, BaseLayerWithLoRA)
    ]
    _replace(model, ((name, layer.base_layer) for name, layer in wrapped))
    try:
        yield
    finally:
        _replace(model, wrapped)


def _replace(model: Any, layers: Iterable[tuple[str, Any]]) -> None:
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


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
