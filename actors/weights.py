"""Weights on their way from the policy's ranks to the rollout engines: both ends of the wire.

A bucket is some parameters laid end to end in one buffer. It travels through the object store, once to each node, and
is mapped there; an engine's process beside the store reads it through a shared-memory segment.

Invariants:

- A bucket carries the digest of its bytes. Whoever loads it computes the digest of what it is about to load.
- A manifest closes an update: how many parameters, and a digest over the buckets' digests in their order. Weights
  count as arrived only when the manifest agrees with what came.
- No tensor is pickled and nothing touches a disk.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from actors.errors import RoleError

Bytes = npt.NDArray[np.uint8]
#: Every parameter starts at a multiple of this, so that its bytes can be viewed as any dtype.
ALIGNMENT = 64
#: What the names of an adapter's weights begin with, as in PEFT's files; no weight of a model is named so.
ADAPTER_PREFIX = "base_model.model."
#: What of a model travels: all weights with adapters merged into them, those beside the adapters, or the adapters.
WeightPart = Literal["merged", "base", "adapter"]


class WeightsRefused(RoleError):
    """Weights did not arrive as they were sent, or not all of them."""


@dataclass(frozen=True)
class WeightEntry:
    """A parameter in a bucket: its Hugging Face name, its type and shape, and where its bytes stand."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class WeightBucket:
    """Some parameters, laid end to end in ``payload``, (num_bytes,) uint8."""

    entries: tuple[WeightEntry, ...]
    payload: Bytes
    digest: str

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, Tensor]]) -> WeightBucket:
        """Copy parameters, from whatever device, into a new bucket."""
        entries: list[WeightEntry] = []
        end = 0
        for name, tensor in parameters:
            num_bytes = tensor.numel() * tensor.element_size()
            entries.append(WeightEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape), end, num_bytes))
            end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        # What stands between the parameters is part of the digest, so it is not left to chance.
        payload = torch.zeros(end, dtype=torch.uint8)
        for entry, (_, tensor) in zip(entries, parameters, strict=True):
            view = payload[entry.offset : entry.offset + entry.num_bytes].view(tensor.dtype)
            view.copy_(tensor.detach().reshape(-1))
        array: Bytes = payload.numpy()
        return cls(tuple(entries), array, digest_of(array))


@dataclass(frozen=True)
class WeightManifest:
    """What a whole update consists of. The digest is over the buckets' digests, or over names, types and shapes."""

    version: int
    num_parameters: int
    num_bytes: int
    digest: str


class Described(Protocol):
    """A parameter's name, type and whole shape."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Tally:
    """Counts the buckets of an update, at either end of the wire."""

    def __init__(self) -> None:
        self._num_parameters = 0
        self._num_bytes = 0
        self._digest = xxhash.xxh3_128()

    def add(self, bucket: WeightBucket) -> None:
        """One more bucket."""
        self._num_parameters += len(bucket.entries)
        self._num_bytes += bucket.payload.nbytes
        self._digest.update(bucket.digest.encode())

    def add_layout(self, parameters: Sequence[Described]) -> None:
        """Parameters whose bytes this end does not see: their names, types and shapes count."""
        for parameter in parameters:
            num_elements = math.prod(parameter.shape)
            self._num_parameters += 1
            self._num_bytes += num_elements * getattr(torch, parameter.dtype).itemsize
            self._digest.update(f"{parameter.name} {parameter.dtype} {parameter.shape};".encode())

    def manifest(self, version: int) -> WeightManifest:
        """What came so far, as the whole of version ``version``."""
        return WeightManifest(version, self._num_parameters, self._num_bytes, self._digest.hexdigest())


def digest_of(payload: Bytes) -> str:
    """XXH3, 128 bits: finds bytes that changed on the way; it is no defence against intent."""
    return str(xxhash.xxh3_128(payload.data).hexdigest())


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def unpack(payload: Tensor, entries: Sequence[WeightEntry]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a bucket, as **copies**, so that the payload's memory can be used again."""
    for entry in entries:
        raw = payload[entry.offset : entry.offset + entry.num_bytes].clone()
        yield entry.name, raw.view(getattr(torch, entry.dtype)).view(entry.shape)


class SharedSegment:
    """A piece of shared memory that is used for one bucket after another; it grows to the largest.

    Its pages stay, because the first touch of fresh shared memory costs ten times what reusing it does. It has no
    name in any folder: other processes of the same user reach it by ``path`` for as long as this one lives, and a
    process that is killed leaves nothing behind. Nor does the size of /dev/shm, 64 MiB in many containers, bound it.
    """

    def __init__(self, name: str) -> None:
        self._file = os.memfd_create(f"troupe-{name}")
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self._map: mmap.mmap | None = None
        self._size = 0

    def write(self, payload: Bytes) -> None:
        """Put a bucket's bytes at the beginning of the segment.

        Raises:
            OSError: memory is short.
        """
        if payload.nbytes > self._size:
            # posix_fallocate, unlike truncation, fails here and now where memory is short.
            os.posix_fallocate(self._file, 0, payload.nbytes)
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self._file, payload.nbytes)
            self._size = payload.nbytes
        if self._map is not None:
            self._map[: payload.nbytes] = payload.data

    def close(self) -> None:
        """Give the memory back. A second time does nothing."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def map_segment(path: str, num_bytes: int) -> Tensor:
    """The first ``num_bytes`` of a segment that another process wrote, (num_bytes,) uint8, to read from.

    What is written to the tensor stays in this process.

    Raises:
        OSError: the segment is gone, or belongs to another user.
    """
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)
