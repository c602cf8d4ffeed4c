"""The policy's end of vLLM's NCCL weight transfer. Not run on a GPU yet: written from the source of vLLM 0.32.

vLLM's sender would itself tell the engines to open, receive and finish. Here the driver does, because it alone
reaches them; so the sender is given a client that does nothing, and its calls and the driver's run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from actors.weight_channels import NUM_BUFFERS, Meeting, WeightMeta


class DriverCallsEngines:
    """A client for vLLM's sender whose calls do nothing."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The driver does: ``RolloutActor.join``."""

    def start_weight_update(self) -> None:
        """The driver does: ``RolloutActor.begin_update``."""

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """The driver does: ``RolloutActor.receive_broadcast``."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The driver does: ``RolloutActor.finish_update``."""


class Weights(WeightSource):  # type: ignore[misc]  # untyped in vLLM
    """The policy's weights as vLLM asks for them; iterating gathers sharded ones, on all ranks alike.

    Args:
        layout: what iteration will give, known without gathering.
        lists: a fresh pass over the weights; sharded ones exist only until the next list.
        sharded: whether they are.
    """

    def __init__(
        self,
        layout: Sequence[WeightMeta],
        lists: Callable[[], Iterator[list[tuple[str, Tensor]]]],
        *,
        sharded: bool,
    ) -> None:
        self._layout = layout
        self._lists = lists
        self._sharded = sharded

    def metadata(self) -> list[ParamMeta]:
        """Name, type and whole shape of every parameter, without gathering."""
        return [ParamMeta(meta.name, getattr(torch, meta.dtype), meta.shape) for meta in self._layout]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for parameters in self._lists():
            for name, tensor in parameters:
                # vLLM packs across lists, so a sharded one must outlive its own.
                yield name, tensor.clone() if self._sharded else tensor


class WeightBroadcast:
    """One rank's part in broadcasting the policy's weights."""

    def __init__(self, meeting: Meeting, rank: int, weights: Weights) -> None:
        """Open the NCCL group, together with every engine. Collective; only the policy's first rank is in the group."""
        info = NCCLTrainerInitInfo(
            rank=rank,
            master_address=meeting.address,
            master_port=meeting.port,
            world_size=meeting.world_size,
            packed=True,
            packed_buffer_size_bytes=meeting.bucket_bytes,
            packed_num_buffers=NUM_BUFFERS,
        )
        self._sender = NCCLTrainerWeightTransferEngine.trainer_init(info, client=DriverCallsEngines(), source=weights)

    def send(self) -> None:
        """Broadcast all weights, while the engines receive. Collective over the policy's ranks."""
        self._sender.send_weights()

    def close(self) -> None:
        """Leave the group."""
        self._sender.shutdown()
