"""vLLM as it is without our remedies. Named as an engine's worker extension, by tests that show what they are for."""

from __future__ import annotations

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from actors.vllm_engine.worker import SharedMemoryEngine, WorkerExtension

BACKEND = "without_remedies"


class StaleHead(SharedMemoryEngine):
    """Leaves the packed output head as it was."""

    def _rebuild_tied_head(self) -> None:
        pass


class Unmended(WorkerExtension):
    """Importing this module, in the worker's process, takes both remedies away."""


def take_remedies_away() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, StaleHead)
    for name in ("_sample", "_bookkeeping_sync"):
        setattr(CPUModelRunner, name, getattr(CPUModelRunner, name).__wrapped__)


take_remedies_away()
