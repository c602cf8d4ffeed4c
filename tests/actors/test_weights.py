"""Buckets of weights, their digests, and the memory that they pass through. No engine here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.weights import ALIGNMENT, SharedSegment, Tally, WeightBucket, digest_of, map_segment, unpack

SHARED_MEMORY = Path("/dev/shm")


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    source = torch.Generator().manual_seed(0)
    shapes = {"embed": (7, 5), "bias": (3,), "scale": (), "deep": (2, 3, 5)}
    return [(name, torch.randn(shape, generator=source).to(dtype)) for name, shape in shapes.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bucket_gives_back_the_parameters(dtype: torch.dtype) -> None:
    given = parameters(dtype)
    bucket = WeightBucket.of(given)
    came = list(unpack(torch.from_numpy(bucket.payload), bucket.entries))
    assert [name for name, _ in came] == [name for name, _ in given]
    for (_, left), (_, right) in zip(came, given, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert torch.equal(left, right)


def test_a_bucket_may_mix_types_and_take_views() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    given = [("half", torch.ones(3, dtype=torch.bfloat16)), ("turned", matrix.t()), ("whole", torch.arange(5))]
    bucket = WeightBucket.of(given)
    came = dict(unpack(torch.from_numpy(bucket.payload), bucket.entries))
    assert torch.equal(came["turned"], matrix.t())
    assert torch.equal(came["whole"], torch.arange(5))
    assert all(entry.offset % ALIGNMENT == 0 for entry in bucket.entries)


def test_a_bucket_is_a_copy_and_so_is_what_leaves_it() -> None:
    weight = torch.ones(8)
    bucket = WeightBucket.of([("weight", weight)])
    weight.zero_()
    payload = torch.from_numpy(bucket.payload)
    ((_, came),) = unpack(payload, bucket.entries)
    payload.zero_()
    assert torch.equal(came, torch.ones(8))


def test_equal_weights_have_equal_digests_and_one_bit_changes_them() -> None:
    first, second = WeightBucket.of(parameters()), WeightBucket.of(parameters())
    assert first.digest == second.digest == digest_of(second.payload)
    for place in (0, first.payload.nbytes // 2, first.payload.nbytes - 1):
        damaged = first.payload.copy()
        damaged[place] ^= 1
        assert digest_of(damaged) != first.digest


def test_the_manifest_tells_what_is_missing_doubled_or_swapped() -> None:
    buckets = [WeightBucket.of([pair]) for pair in parameters()]

    def manifest(*order: int) -> object:
        tally = Tally()
        for place in order:
            tally.add(buckets[place])
        return tally.manifest(3)

    whole = manifest(0, 1, 2, 3)
    assert whole == manifest(0, 1, 2, 3)
    for wrong in ((0, 1, 2), (0, 1, 2, 3, 3), (1, 0, 2, 3), (0, 1, 2, 2)):
        assert manifest(*wrong) != whole
    tally = Tally()
    for bucket in buckets:
        tally.add(bucket)
    assert tally.manifest(4) != whole, "the version is part of it"
    assert tally.manifest(3).num_parameters == 4
    assert tally.manifest(3).num_bytes == sum(bucket.payload.nbytes for bucket in buckets)


def test_the_manifest_tells_one_changed_bucket() -> None:
    buckets = [WeightBucket.of([pair]) for pair in parameters()]
    sent, came = Tally(), Tally()
    for bucket in buckets:
        sent.add(bucket)
    for bucket in (replace(buckets[0], digest="0" * 32), *buckets[1:]):
        came.add(bucket)
    assert sent.manifest(0) != came.manifest(0)


def test_a_segment_carries_one_bucket_after_another_and_grows() -> None:
    segment = SharedSegment("test")
    try:
        small, large = (WeightBucket.of([("w", torch.arange(float(size)))]) for size in (5, 5000))
        for bucket in (small, large, small):
            segment.write(bucket.payload)
            seen = map_segment(segment.path, bucket.payload.nbytes)
            assert digest_of(seen.numpy()) == bucket.digest
    finally:
        segment.close()


def test_a_segment_is_read_by_another_process() -> None:
    segment = SharedSegment("test")
    try:
        bucket = WeightBucket.of(parameters())
        segment.write(bucket.payload)
        program = (
            "import sys; from actors.weights import digest_of, map_segment;"
            "print(digest_of(map_segment(sys.argv[1], int(sys.argv[2])).numpy()))"
        )
        arguments = [sys.executable, "-c", program, segment.path, str(bucket.payload.nbytes)]
        read = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
        assert read.stdout.strip() == bucket.digest
    finally:
        segment.close()


def test_what_a_reader_writes_stays_its_own() -> None:
    segment = SharedSegment("test")
    try:
        bucket = WeightBucket.of(parameters())
        segment.write(bucket.payload)
        map_segment(segment.path, bucket.payload.nbytes).zero_()
        assert digest_of(map_segment(segment.path, bucket.payload.nbytes).numpy()) == bucket.digest
    finally:
        segment.close()


def test_a_closed_segment_is_gone() -> None:
    before = set(SHARED_MEMORY.iterdir())
    segment = SharedSegment("test")
    segment.write(WeightBucket.of(parameters()).payload)
    path = segment.path
    segment.close()
    with pytest.raises(OSError):
        map_segment(path, 64)
    assert set(SHARED_MEMORY.glob("troupe*")) <= before


def test_a_killed_process_leaves_no_segment() -> None:
    program = (
        "import os, signal, torch; from actors.weights import SharedSegment, WeightBucket;"
        "s = SharedSegment('killed'); s.write(WeightBucket.of([('w', torch.ones(1000))]).payload);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, env=dict(os.environ))
    assert died.returncode == -signal.SIGKILL
    assert not list(SHARED_MEMORY.glob("troupe-killed*"))
