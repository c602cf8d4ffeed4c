"""The exponential moving average of a model in training, kept in float32 and sharded over the ranks.

Invariants:

- Each rank keeps the average of its share of every weight: of the shard that DeepSpeed gave it under ZeRO-3, else of
  an even cut. Together the ranks hold each average once.
- What is averaged is the weights as they compute, in their own precision, once for each update that was applied.
- Where weights are whole on every rank they are the same on every rank, so that a rank that keeps its share of them
  can give them back: no rank ever keeps a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from actors.errors import RoleError
from actors.models import PREFIX, PackedModel
from algorithms.averages import update_averages_
from cluster.context import RankContext


class MovingAverage:
    """One rank's share."""

    def __init__(
        self, model: PackedModel, context: RankContext, decay: float, device: torch.device, *, sharded: bool
    ) -> None:
        """Begin with the weights as they are; after DeepSpeed has taken the model apart, if it does.

        ``device`` is the rank's, on which shares are exchanged; with offloaded weights they lie elsewhere.
        """
        self._parameters = [(name.removeprefix(PREFIX), parameter) for name, parameter in model.named_parameters()]
        self._context = context
        self._decay = decay
        self._device = device
        self._sharded = sharded
        self._averages = [shard.to(torch.float32, copy=True) for shard in self._shards()]

    def update(self) -> None:
        """Move towards the weights by ``1 - decay`` of the way. To be called once for each applied update."""
        update_averages_(self._averages, list(self._shards()), self._decay)

    def state(self) -> list[Tensor]:
        """What a checkpoint keeps of this rank's share."""
        return self._averages

    def load(self, state: list[Tensor] | None, folder: Path) -> None:
        """Go on from what ``state`` gave.

        Raises:
            RoleError: the checkpoint in ``folder`` holds none.
        """
        if state is None:
            raise RoleError(
                f"{self._context.role}: the checkpoint in {folder} has no moving average: no ema_decay then"
            )
        for average, stored in zip(self._averages, state, strict=True):
            average.copy_(stored)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The averages by Hugging Face name, in the weights' precision, one at a time. Collective."""
        for (name, parameter), average in zip(self._parameters, self._averages, strict=True):
            yield name, self._join(parameter, average).to(parameter.dtype)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the averages, rounded to the weights' precision. Collective.

        Each rank keeps its share of the weights meanwhile, and they come back as they were, whatever is raised inside.
        Under ZeRO-3 the shards change, not what is gathered of them.
        """
        own = [shard.clone() for shard in self._shards()]
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(own)

    def _write(self, shares: Iterable[Tensor]) -> None:
        """Make ``shares``, one of each weight, the model's."""
        for (_, parameter), share in zip(self._parameters, shares, strict=True):
            if self._sharded:
                _zero3_shard(parameter).copy_(share)
            else:
                parameter.detach().copy_(self._join(parameter, share.to(parameter.dtype)))

    def _join(self, parameter: nn.Parameter, share: Tensor) -> Tensor:
        """The whole of a weight from each rank's share. Collective."""
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        size = -(-shape.numel() // self._context.num_ranks)
        # The last shares may be shorter, or empty.
        share = torch.cat([share, share.new_zeros(size - len(share))]).to(self._device)
        shares = [torch.empty_like(share) for _ in range(self._context.num_ranks)]
        torch.distributed.all_gather(shares, share)
        return torch.cat(shares)[: shape.numel()].view(shape)

    def _shards(self) -> Iterator[Tensor]:
        """This rank's share of each weight, flat."""
        for _, parameter in self._parameters:
            yield _zero3_shard(parameter) if self._sharded else self._even_share(parameter)

    def _even_share(self, parameter: nn.Parameter) -> Tensor:
        size = -(-parameter.numel() // self._context.num_ranks)
        begin = self._context.rank * size
        return parameter.detach().flatten()[begin : begin + size]


def _zero3_shard(parameter: nn.Parameter) -> Tensor:
    shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return shard.detach().flatten()
