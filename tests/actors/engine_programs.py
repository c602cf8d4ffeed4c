"""What the engine tests run in each rank's process. Every function takes the rank's context first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.config import ModelConfig, OptimizerConfig, TrainedRoleConfig, ZeroConfig
from actors.deepspeed_engine import TrainEngine
from actors.models import load_causal_lm
from cluster.context import RankContext

Sequences = list[list[int]]


def config(folder: Path, stage: int, **changes: Any) -> TrainedRoleConfig:
    dtype = changes.pop("dtype", "float32")
    optimizer = {"learning_rate": 1e-2, "max_grad_norm": 0.5} | changes.pop("optimizer", {})
    zero = ZeroConfig(stage=stage, **changes.pop("zero", {}))
    return TrainedRoleConfig(
        model=ModelConfig(path=str(folder), dtype=dtype), zero=zero, optimizer=OptimizerConfig(**optimizer), **changes
    )


def batch(step: int, num_rows: int = 8) -> Sequences:
    """Rows of 3 to 17 tokens, the same on every rank."""
    source = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 18, (num_rows,), generator=source).tolist()
    return [torch.randint(2, 64, (length,), generator=source).tolist() for length in lengths]


def pack(rows: Sequences) -> tuple[Tensor, Tensor]:
    if not rows:
        return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return torch.tensor([token for row in rows for token in row]), torch.cat([torch.arange(len(row)) for row in rows])


def token_loss(denominator: int) -> Any:
    """Mean next-token loss, written out."""

    def loss(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        tokens, positions = micro_batch
        targets = (positions > 0).nonzero()[:, 0]
        logits = model(tokens, positions, targets - 1)
        total = nn.functional.cross_entropy(logits.float(), tokens[targets], reduction="sum") / denominator
        return total, {"tokens": total.new_tensor(float(len(targets))), "longest_max": positions.max().float()}

    return loss


def deal(rows: Sequences, own: RankContext, rows_per_pack: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's packs of a batch: equally many on each rank, the last ones maybe empty."""
    packs = [rows[first : first + rows_per_pack] for first in range(0, len(rows), rows_per_pack)]
    packs += [[]] * (-len(packs) % own.num_ranks)
    return [pack(part) for part in packs[own.rank :: own.num_ranks]]


def train(
    own: RankContext, folder: Path, stage: int, rows_per_pack: int, num_steps: int, changes: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of each step and the weights after the last."""
    settings = config(folder, stage, **changes)
    engine = TrainEngine(load_causal_lm(settings.model), own, settings)
    reports = []
    for step in range(num_steps):
        rows = batch(step)
        loss = token_loss(sum(len(row) - 1 for row in rows))
        reports.append(engine.step(deal(rows, own, rows_per_pack), loss, 1e-2 / (1 + step)))
    return reports, weights(engine)


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in engine.weights(20_000) for name, tensor in bucket}
