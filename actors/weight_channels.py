"""How weights go from GPU to GPU: what both ends and the driver agree on, as plain values.

``nccl``: the policy's first rank broadcasts to every worker of every engine, all in one NCCL group.
``ipc``: policy and engine share a GPU; a bucket is packed there, and its CUDA-IPC handle is all that travels.

Both use vLLM's own engines. Neither has been run on a GPU yet: they were written from the source of vLLM 0.32. Unlike
shared memory they carry no digest of the bytes: a manifest covers names, types and shapes alone.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from actors.weights import WeightPart, WeightsRefused, dtype_name

Transfer: TypeAlias = Literal["shared_memory", "nccl", "ipc"]

#: Buckets that NCCL sends while the next are filled.
NUM_BUFFERS = 2


@dataclass(frozen=True)
class WeightMeta:
    """A parameter without its values: Hugging Face name, type, whole shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Endpoint:
    """What one engine says of itself: how it takes weights, over how many workers, whether it is connected, and what
    it wants of the policy next."""

    transfer: Transfer
    num_workers: int
    is_open: bool
    parts: tuple[WeightPart, ...] = ("merged",)


@dataclass(frozen=True)
class Meeting:
    """Where the NCCL group of the weights meets, and who is who in it.

    The policy's first rank is number 0; the workers of engine ``e`` are numbered from ``offsets[e]`` on.
    """

    address: str
    port: int
    world_size: int
    offsets: tuple[int, ...]
    bucket_bytes: int

    @classmethod
    def of(cls, address: str, port: int, num_workers: Sequence[int], bucket_bytes: int) -> Meeting:
        """A meeting of the policy with engines of so many workers each."""
        ends = list(accumulate(num_workers, initial=1))
        return cls(address, port, ends[-1], tuple(ends[:-1]), bucket_bytes)

    def init_info(self, engine: int) -> dict[str, Any]:
        """What vLLM's NCCL engine is opened with in engine number ``engine``."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": self.offsets[engine],
            "world_size": self.world_size,
            "packed": True,
            "packed_buffer_size_bytes": self.bucket_bytes,
            "packed_num_buffers": NUM_BUFFERS,
        }


@dataclass(frozen=True)
class SharedBucket:
    """Some parameters, packed into one buffer on each of the policy's GPUs.

    ``handles`` holds, by the GPU's UUID, the pickled arguments that rebuild the buffer in another process.
    """

    parameters: tuple[WeightMeta, ...]
    num_bytes: tuple[int, ...]
    handles: Mapping[str, bytes]

    @classmethod
    def merged(cls, parts: Sequence[SharedBucket]) -> SharedBucket:
        """One bucket of what every rank of the policy shares.

        Raises:
            WeightsRefused: the ranks do not share the same parameters.
        """
        first = parts[0]
        if any(part.parameters != first.parameters for part in parts):
            raise WeightsRefused("the policy's ranks share different parameters in one bucket")
        handles = {uuid: handle for part in parts for uuid, handle in part.handles.items()}
        return cls(first.parameters, first.num_bytes, handles)


def broadcast_info(parameters: Sequence[WeightMeta]) -> dict[str, Any]:
    """What vLLM's NCCL engine is told to receive."""
    return {
        "names": [parameter.name for parameter in parameters],
        "dtype_names": [parameter.dtype for parameter in parameters],
        "shapes": [list(parameter.shape) for parameter in parameters],
    }


def shared_info(bucket: SharedBucket) -> dict[str, Any]:
    """What vLLM's IPC engine is told to receive. It unpickles, so its environment must allow that."""
    handles = {uuid: pickle.loads(handle) for uuid, handle in bucket.handles.items()}
    return {
        **broadcast_info(bucket.parameters),
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        "tensor_sizes": list(bucket.num_bytes),
    }


def pack(parameters: Sequence[tuple[str, Tensor]]) -> tuple[tuple[WeightMeta, ...], tuple[int, ...], Tensor]:
    """Parameters end to end in one new buffer on their device, (num_bytes,) uint8, as vLLM takes them apart."""
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in parameters]
    metas = tuple(WeightMeta(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in parameters)
    return metas, tuple(len(part) for part in flat), torch.cat(flat)


def handle_of(packed: Tensor) -> tuple[str, bytes]:
    """UUID of the GPU that a buffer is on, and the pickled CUDA-IPC handle to it.

    The buffer must live until every engine has copied it.
    """
    # Another process is about to read it, which knows nothing of this one's streams.
    torch.cuda.current_stream(packed.device).synchronize()
    _, arguments = reduce_tensor(packed)  # type: ignore[no-untyped-call]  # untyped in PyTorch
    return str(torch.cuda.get_device_properties(packed.device).uuid), pickle.dumps(arguments)
