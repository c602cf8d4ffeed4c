"""The policy's end of the wire to the rollout engines, on one of its ranks.

Invariants:

- Weights leave some at a time: with ZeRO-3 the whole model is never on one device.
- What was sent is tallied, so that the manifest is of what went out and not of what should have.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor

from actors.deepspeed_engine import TrainEngine
from actors.errors import RoleError
from actors.exports import saved_form
from actors.models import PREFIX, PackedModel
from actors.weight_channels import Meeting, SharedBucket, WeightMeta, handle_of, pack
from actors.weights import ADAPTER_PREFIX, Tally, WeightBucket, WeightManifest, WeightPart, dtype_name
from cluster.context import RankContext

if TYPE_CHECKING:
    from actors.vllm_engine.broadcast import WeightBroadcast


def layout_of(model: PackedModel) -> list[WeightMeta]:
    """What will be sent of a model that no engine has sharded yet, in its order."""
    return [
        WeightMeta(own, dtype_name(weight.dtype), tuple(weight.shape))
        for name, parameter in model.named_parameters()
        for own, weight in saved_form(model, name.removeprefix(PREFIX), parameter.detach().to("meta"))
    ]


class WeightSender:
    """Sends a trained model's weights, by shared memory, NCCL or CUDA-IPC."""

    def __init__(
        self,
        engine: TrainEngine,
        model: PackedModel,
        context: RankContext,
        layout: Sequence[WeightMeta],
        *,
        sharded: bool,
    ) -> None:
        """Of ``model``, which ``engine`` trains and whose ``layout`` was taken before it did."""
        self._engine = engine
        self._model = model
        self._context = context
        self._layout = list(layout)
        self._sharded = sharded
        self._tally = Tally()
        self._broadcast: WeightBroadcast | None = None
        self._lists: Iterator[list[tuple[str, Tensor]]] = iter(())
        self._shared: Tensor | None = None

    def manifest(self, version: int) -> WeightManifest:
        """What was last sent, as ``version``."""
        return self._tally.manifest(version)

    def buckets(self, bucket_bytes: int, parts: Sequence[WeightPart]) -> Iterator[WeightBucket]:
        """Those parts in buckets, copied out of the model. With sharded weights collective: see ``join_gather``."""
        self._tally = Tally()
        for parameters in self._saved(bucket_bytes, parts):
            bucket = WeightBucket.of(parameters)
            self._tally.add(bucket)
            yield bucket

    def join_gather(self, bucket_bytes: int, parts: Sequence[WeightPart]) -> None:
        """Take part in the first rank's ``buckets``; without sharded weights there is nothing to do."""
        if self._sharded:
            for _ in self._saved(bucket_bytes, parts):
                pass

    def layout(self) -> list[WeightMeta]:
        """Every parameter in the order it is sent, without gathering."""
        return self._layout

    def meeting_point(self) -> tuple[str, int]:
        """Where engines can reach this rank: its node's address, and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return self._context.master_address, int(probe.getsockname()[1])

    def open_broadcast(self, meeting: Meeting) -> None:
        """Connect with the engines, which connect at the same time. Collective.

        Raises:
            RoleError: this rank is not on a GPU.
        """
        self._require_gpu("nccl")
        # Here, so that only a policy that broadcasts loads vLLM.
        from actors.vllm_engine.broadcast import WeightBroadcast, Weights

        if self._broadcast is not None:
            self._broadcast.close()
        size = meeting.bucket_bytes
        weights = Weights(self.layout(), lambda: self._saved(size), sharded=self._sharded)
        self._broadcast = WeightBroadcast(meeting, self._context.rank, weights)

    def broadcast(self) -> None:
        """Send all weights to engines that receive at the same time. Collective.

        Raises:
            RoleError: ``open_broadcast`` was not called.
        """
        if self._broadcast is None:
            raise RoleError(f"{self._context.role}: the broadcast of weights was not opened")
        self._tally = Tally()
        self._tally.add_layout(self.layout())
        self._broadcast.send()

    def begin_sharing(self, bucket_bytes: int) -> None:
        """Make ready for ``share_next``.

        Raises:
            RoleError: this rank is not on a GPU.
        """
        self._require_gpu("ipc")
        self._tally = Tally()
        self._lists = self._saved(bucket_bytes)

    def share_next(self) -> SharedBucket | None:
        """The next weights, packed on this rank's GPU until this is called again; none after the last. Collective."""
        parameters = next(self._lists, None)
        if parameters is None:
            self._shared = None
            return None
        metas, sizes, self._shared = pack(parameters)
        self._tally.add_layout(metas)
        uuid, handle = handle_of(self._shared)
        return SharedBucket(metas, sizes, {uuid: handle})

    def _saved(
        self, bucket_bytes: int, parts: Sequence[WeightPart] = ("merged",)
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """The engine's weights in the form in which Transformers saves them; an adapter as it is."""
        for weights in self._engine.weights(bucket_bytes, parts):
            forms = (
                [(name, weight)] if name.startswith(ADAPTER_PREFIX) else saved_form(self._model, name, weight)
                for name, weight in weights
            )
            yield list(chain.from_iterable(forms))

    def _require_gpu(self, way: str) -> None:
        if self._context.device != "cuda":
            raise RoleError(
                f"{self._context.role}: rollout.weight_transfer {way} goes from GPU to GPU, and this rank is on CPU: "
                "use auto or shared_memory"
            )


def shared_parts(parts: Sequence[SharedBucket | None]) -> SharedBucket | None:
    """What all ranks shared in one ``share_next``, as one bucket; none when they are through."""
    whole = [part for part in parts if part is not None]
    return SharedBucket.merged(whole) if whole else None
