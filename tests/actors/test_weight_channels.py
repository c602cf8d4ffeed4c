"""What the ways from GPU to GPU agree on, as far as it can be seen without a GPU."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.config import ModelConfig
from actors.errors import RoleError, RolloutError
from actors.rollout import RolloutActor, engine_environment, transfer_environment
from actors.weight_channels import Meeting, SharedBucket, WeightMeta, broadcast_info, pack, shared_info
from actors.weight_sender import WeightSender, shared_parts
from actors.weights import Tally, WeightsRefused
from tests.actors import rollouts
from tests.actors.ranks import Ranks, context
from tests.actors.role_programs import layout_and_weights

pytestmark = [pytest.mark.usefixtures("vllm_surroundings"), pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS)]

METAS = [WeightMeta("embed", "float32", (4, 3)), WeightMeta("bias", "float32", (3,))]
PARAMETERS = [("embed", torch.arange(12.0).reshape(4, 3)), ("bias", torch.ones(3))]


def bucket(uuid: str, metas: list[WeightMeta] = METAS) -> SharedBucket:
    return SharedBucket(tuple(metas), (48, 12), {uuid: pickle.dumps((torch.float32, uuid))})


@pytest.mark.parametrize(
    ("num_workers", "offsets", "world_size"), [([1], (1,), 2), ([1, 1, 1], (1, 2, 3), 4), ([4, 4], (1, 5), 9)]
)
def test_every_worker_has_a_number_of_its_own(
    num_workers: list[int], offsets: tuple[int, ...], world_size: int
) -> None:
    meeting = Meeting.of("10.0.0.1", 29_500, num_workers, 1 << 20)
    assert (meeting.offsets, meeting.world_size) == (offsets, world_size)
    taken = [offset + worker for offset, size in zip(offsets, num_workers, strict=True) for worker in range(size)]
    assert sorted([0, *taken]) == list(range(world_size))


def test_vllm_takes_what_nccl_is_opened_and_told_with() -> None:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    engine: Any = NCCLWeightTransferEngine.__new__(NCCLWeightTransferEngine)
    meeting = Meeting.of("10.0.0.1", 29_500, [2, 2], 1 << 20)
    opened = engine.parse_init_info(meeting.init_info(1))
    assert (opened.rank_offset, opened.world_size, opened.master_port) == (3, 5, 29_500)
    assert opened.packed and opened.packed_buffer_size_bytes == 1 << 20
    told = engine.parse_update_info(broadcast_info(METAS))
    assert (told.names, told.dtype_names, told.shapes) == (["embed", "bias"], ["float32"] * 2, [[4, 3], [3]])


def test_vllm_takes_what_ipc_is_opened_and_told_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    engine: Any = IPCWeightTransferEngine.__new__(IPCWeightTransferEngine)
    assert engine.parse_init_info({"packed": True}).packed
    shared = shared_info(SharedBucket.merged([bucket("GPU-0"), bucket("GPU-1")]))
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    with pytest.raises(ValueError, match="VLLM_ALLOW_INSECURE_SERIALIZATION"):
        engine.parse_update_info(shared)
    for name, value in transfer_environment("ipc").items():
        monkeypatch.setenv(name, value)
    told = engine.parse_update_info(shared)
    assert told.ipc_handles == {"GPU-0": (torch.float32, "GPU-0"), "GPU-1": (torch.float32, "GPU-1")}
    assert told.tensor_sizes == [48, 12]


def test_only_ipc_may_unpickle() -> None:
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    assert transfer_environment("ipc") == {name: "1"}
    assert not transfer_environment("nccl") and not transfer_environment("shared_memory")
    assert name not in engine_environment(on_gpu=True) | engine_environment(on_gpu=False)


def test_vllm_unpacks_what_is_packed() -> None:
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    metas, sizes, packed = pack(PARAMETERS)
    assert list(metas) == METAS
    told = shared_info(SharedBucket(metas, sizes, {}))
    dtypes = [getattr(torch, name) for name in told["dtype_names"]]
    came = unpack_tensor(packed, told["names"], told["shapes"], dtypes, told["tensor_sizes"])
    for (name, left), (expected, right) in zip(came, PARAMETERS, strict=True):
        assert name == expected and torch.equal(left, right)


def test_parts_of_ranks_become_one_bucket() -> None:
    merged = shared_parts([bucket("GPU-0"), bucket("GPU-1")])
    assert merged is not None and set(merged.handles) == {"GPU-0", "GPU-1"}
    assert shared_parts([None, None]) is None
    with pytest.raises(WeightsRefused, match="different parameters"):
        shared_parts([bucket("GPU-0"), bucket("GPU-1", METAS[::-1])])


def test_handles_are_plain_values() -> None:
    encoded = shared_info(bucket("GPU-0"))["ipc_handles_pickled"]
    assert pickle.loads(base64.b64decode(encoded)) == {"GPU-0": (torch.float32, "GPU-0")}


def test_the_manifest_of_a_layout_tells_order_and_shape() -> None:
    def manifest(*metas: WeightMeta) -> object:
        tally = Tally()
        tally.add_layout(metas)
        return tally.manifest(0)

    tally = Tally()
    for meta in METAS:
        tally.add_layout([meta])
    assert tally.manifest(0) == manifest(*METAS), "in how many lists it came does not matter"
    assert tally.manifest(0).num_bytes == 60
    assert manifest(*METAS[::-1]) != manifest(*METAS) != manifest(METAS[0])


@pytest.mark.parametrize("stage", [1, 3])
def test_the_layout_is_that_of_the_weights(stage: int, two_ranks: Ranks, models: Path) -> None:
    for layout, weights in two_ranks.run(layout_and_weights, models / "qwen2", stage):
        assert layout == weights
        assert len(layout) > 10


def test_vllms_sender_checks_the_weights_against_their_layout() -> None:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from actors.vllm_engine.broadcast import DriverCallsEngines, Weights

    gathered = [[PARAMETERS[0]], [PARAMETERS[1]]]
    weights = Weights(METAS, lambda: iter(gathered), sharded=True)
    for _ in range(2):
        came = list(NCCLTrainerWeightTransferEngine._checked_iter(weights, weights.metadata()))
        assert [name for name, _ in came] == ["embed", "bias"]
        assert came[0][1].data_ptr() != PARAMETERS[0][1].data_ptr()
    client = DriverCallsEngines()
    wrong = NCCLTrainerWeightTransferEngine(client=client, source=weights, is_sender=True)
    with pytest.raises(ValueError, match="disagrees with iteration"):
        list(wrong._checked_iter(weights, weights.metadata()[::-1]))


def test_a_rank_that_does_not_send_only_gathers() -> None:
    from actors.vllm_engine.broadcast import WeightBroadcast, Weights

    passes = []

    def lists() -> Iterator[list[tuple[str, torch.Tensor]]]:
        passes.append(1)
        yield list(PARAMETERS)

    meeting = Meeting.of("127.0.0.1", 1, [1], 1 << 20)
    other = WeightBroadcast(meeting, 1, Weights(METAS, lists, sharded=True))
    other.send()
    assert passes == [1]
    other.close()


@pytest.mark.parametrize("way", ["nccl", "ipc"])
def test_ways_between_gpus_are_refused_on_cpu(way: Any, tmp_path: Path) -> None:
    config = rollouts.config(weight_transfer=way)
    with pytest.raises(RolloutError, match=f"{way} goes from GPU to GPU.*use auto or shared_memory"):
        RolloutActor(context(role="rollout"), config, ModelConfig(path=str(tmp_path)), 0)
    engine: Any = SimpleNamespace(weights=lambda bucket_bytes: iter(()))
    model: Any = None
    sender = WeightSender(engine, model, context(), METAS, sharded=False)
    meeting = Meeting.of("127.0.0.1", 1, [1], 1 << 20)
    with pytest.raises(RoleError, match=f"{way} goes from GPU to GPU"):
        sender.open_broadcast(meeting) if way == "nccl" else sender.begin_sharing(1 << 20)
    with pytest.raises(RoleError, match="was not opened"):
        sender.broadcast()
