"""A rank's device, and its place among its role's ranks. Knows PyTorch, not DeepSpeed."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from actors.errors import RoleError
from cluster.context import RankContext

#: Ranks wait for their driver in the middle of nothing; how long a call may take is the driver's to say.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)


def prepare_device(context: RankContext) -> torch.device:
    """Threads and device of this rank."""
    torch.set_num_threads(context.num_threads)
    if context.device == "cpu":
        return torch.device("cpu")
    # Ray shows a rank only the GPUs it was given, mostly one; then every rank's is number 0.
    index = context.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join_ranks(context: RankContext) -> torch.device:
    """Make this process rank ``context.rank`` of its role's process group, once. Collective.

    Raises:
        RoleError: the process already belongs to a group of another size, or the ranks did not meet.
    """
    device = prepare_device(context)
    os.environ.update(
        DS_ACCELERATOR=context.device,
        RANK=str(context.rank),
        WORLD_SIZE=str(context.num_ranks),
        LOCAL_RANK=str(device.index or 0),
        MASTER_ADDR=context.master_address,
        MASTER_PORT=str(context.master_port),
    )
    backend = "nccl" if context.device == "cuda" else "gloo"
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group(
                backend,
                init_method=f"tcp://{context.master_address}:{context.master_port}",
                rank=context.rank,
                world_size=context.num_ranks,
                timeout=_COLLECTIVE_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise RoleError(
                f"{context.role}: rank {context.rank} of {context.num_ranks} could not meet the others at "
                f"{context.master_address}:{context.master_port}: {error}"
            ) from error
    elif torch.distributed.get_world_size() != context.num_ranks:
        raise RoleError(
            f"{context.role}: this process is in a group of {torch.distributed.get_world_size()} ranks already, "
            f"not {context.num_ranks}"
        )
    return device
