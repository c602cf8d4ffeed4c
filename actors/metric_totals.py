"""Metrics of micro-batches, added up over an update and over a role's ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: A metric whose name ends so is the largest over micro-batches and ranks; every other metric is summed.
MAX_SUFFIX = "_max"


def accumulate(totals: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    """Take the metrics of one more micro-batch into ``totals``."""
    for name, value in metrics.items():
        value = value.detach()
        if name not in totals:
            totals[name] = value
        else:
            totals[name] = torch.maximum(totals[name], value) if name.endswith(MAX_SUFFIX) else totals[name] + value


def over_ranks(totals: Mapping[str, Tensor], num_ranks: int, device: torch.device) -> dict[str, float]:
    """Totals over all ranks. Collective; every rank gives the same names in the same order."""
    if not totals:
        return {}
    if num_ranks > 1:
        for largest, operation in ((False, torch.distributed.ReduceOp.SUM), (True, torch.distributed.ReduceOp.MAX)):
            names = [name for name in totals if name.endswith(MAX_SUFFIX) == largest]
            if names:
                stacked = torch.stack([totals[name].detach().to(device, torch.float64) for name in names])
                torch.distributed.all_reduce(stacked, op=operation)
                totals = dict(totals) | dict(zip(names, stacked.unbind(), strict=True))
    values = torch.stack([value.detach().to(device, torch.float64) for value in totals.values()]).tolist()
    return dict(zip(totals, values, strict=True))
