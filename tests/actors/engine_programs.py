"""What the engine tests run in each rank's process. Every function takes the rank's context first."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.config import ModelConfig, OptimizerConfig, ScorerConfig, TrainedRoleConfig, ZeroConfig
from actors.deepspeed_engine import ForwardEngine, TrainEngine
from actors.errors import TrainingDiverged
from actors.models import load_causal_lm, load_tokenizer
from cluster.context import RankContext

Sequences = list[list[int]]


def config(folder: Path, stage: int, **changes: Any) -> TrainedRoleConfig:
    dtype = changes.pop("dtype", "float32")
    # Weights without a gradient but for rounding (keys' biases) are to stay where they are.
    optimizer = {"learning_rate": 1e-2, "max_grad_norm": 0.5, "eps": 1e-5} | changes.pop("optimizer", {})
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
    constant = changes.pop("constant_rate", False)
    settings = config(folder, stage, **changes)
    engine = TrainEngine(load_causal_lm(settings.model), own, settings)
    reports = []
    for step in range(num_steps):
        rows = batch(step)
        loss = token_loss(sum(len(row) - 1 for row in rows))
        reports.append(engine.step(deal(rows, own, rows_per_pack), loss, 1e-2 / (1 if constant else 1 + step)))
    return reports, weights(engine)


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in engine.weights(20_000) for name, tensor in bucket}


def train_twice(own: RankContext, folder: Path, stage: int, checkpoint: Path, changes: dict[str, Any]) -> bool:
    """Four steps at once, and two steps, a checkpoint and two more in a fresh engine: the same to the last bit?"""
    settings = config(folder, stage, **changes)

    def run(engine: TrainEngine, steps: range) -> list[dict[str, float]]:
        reports = []
        for step in steps:
            rows = batch(step)
            loss = token_loss(sum(len(row) - 1 for row in rows))
            reports.append(engine.step(deal(rows, own, 3), loss, 1e-2 / (1 + step)))
        return reports

    whole = TrainEngine(load_causal_lm(settings.model), own, settings)
    expected = run(whole, range(4))
    first = TrainEngine(load_causal_lm(settings.model), own, settings)
    run(first, range(2))
    torch.manual_seed(17 + own.rank)
    first.save(checkpoint)
    drawn = torch.rand(3)
    second = TrainEngine(load_causal_lm(settings.model, seed=99), own, settings)
    second.load(checkpoint)
    assert torch.equal(torch.rand(3), drawn), "random state of this rank"
    assert second.num_updates == 2
    resumed = run(second, range(2, 4))
    one, other = weights(whole), weights(second)
    assert resumed == expected[2:], (resumed, expected[2:])
    return all(torch.equal(one[name], other[name]) for name in one)


def diverge(own: RankContext, folder: Path, stage: int, dtype: str, bad: str) -> tuple[str, str, bool]:
    """The errors of an update whose loss or gradient is NaN on one rank, and whether the weights stayed."""
    settings = config(folder, stage, dtype=dtype)
    engine = TrainEngine(load_causal_lm(settings.model), own, settings)
    rows = batch(0)
    good = token_loss(sum(len(row) - 1 for row in rows))
    engine.step(deal(rows, own, 4), good, 1e-2)
    before = weights(engine)

    def loss(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        total, metrics = good(model, micro_batch)
        if own.rank == own.num_ranks - 1:
            # The root of 0 is finite, its derivative is not.
            total = total * float("nan") if bad == "loss" else total + (total - total.detach()).clamp(min=0).sqrt()
        return total, metrics

    messages: list[str] = []
    for micro_batches, where in ((deal(rows, own, 4), "iteration 5, minibatch 2"), (deal(rows, own, 4), "again")):
        try:
            engine.step(micro_batches, loss if not messages else good, 1e-2, where)
        except TrainingDiverged as error:
            messages.append(str(error))
    after = weights(engine)
    return messages[0], messages[1], all(torch.equal(before[name], after[name]) for name in before)


def export(own: RankContext, folder: Path, stage: int, target: Path) -> None:
    """Two steps, then a Hugging Face folder."""
    settings = config(folder, stage)
    engine = TrainEngine(load_causal_lm(settings.model), own, settings)
    for step in range(2):
        rows = batch(step)
        engine.step(deal(rows, own, 4), token_loss(sum(len(row) - 1 for row in rows)), 1e-2)
    engine.export(target, load_tokenizer(settings.model))


def bucket_sizes(own: RankContext, folder: Path, stage: int, bucket_bytes: int) -> list[tuple[int, int, int]]:
    """Of each bucket: its tensors, its bytes, and elements of the model that this rank holds meanwhile."""
    settings = config(folder, stage)
    model = load_causal_lm(settings.model)
    engine = TrainEngine(model, own, settings)
    return [
        (len(bucket), sum(t.numel() * t.element_size() for _, t in bucket), sum(p.numel() for p in model.parameters()))
        for bucket in engine.weights(bucket_bytes)
    ]


def forward_logits(own: RankContext, folder: Path, sharding: str) -> tuple[Tensor, bool]:
    """Logits of a pack, and whether DeepSpeed was loaded for them."""
    settings = ScorerConfig(model=ModelConfig(path=str(folder), dtype="float32"), sharding=sharding)
    engine = ForwardEngine(load_causal_lm(settings.model), own, settings)
    logits = engine.forward([pack(batch(0))], lambda model, micro_batch: torch.as_tensor(model(*micro_batch)))
    return logits[0], "deepspeed" in sys.modules


def save(own: RankContext, folder: Path, stage: int, checkpoint: Path) -> None:
    settings = config(folder, stage)
    TrainEngine(load_causal_lm(settings.model), own, settings).save(checkpoint)


def load(own: RankContext, folder: Path, stage: int, checkpoint: Path) -> None:
    settings = config(folder, stage)
    TrainEngine(load_causal_lm(settings.model), own, settings).load(checkpoint)
