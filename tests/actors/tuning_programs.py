"""What the tests of tuning run in each rank's process. Every function takes the rank's context first."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import (
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    TrainedRoleConfig,
    TuningConfig,
    ZeroConfig,
)
from actors.deepspeed_engine import TrainEngine
from actors.models import PackedModel, load_causal_lm, load_scorer, load_tokenizer
from actors.policy import PolicyActor
from actors.weights import WeightBucket, WeightManifest, WeightPart
from actors.zero_settings import training_settings
from algorithms.config import OnlineConfig
from cluster.context import RankContext
from tests.actors import engine_programs as programs

LORA = {"rank": 4, "alpha": 8.0}


def config(folder: Path, stage: int, method: str = "lora", **changes: Any) -> TrainedRoleConfig:
    lora = ({} if method == "full" else LORA) | changes.pop("lora", {})
    tuning = {"method": method, "lora": lora} | changes.pop("tuning", {})
    return TrainedRoleConfig(
        model=ModelConfig(path=str(folder), dtype=changes.pop("dtype", "float32"), **changes.pop("model", {})),
        zero=ZeroConfig(stage=stage, **changes.pop("zero", {})),
        optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5, eps=1e-5),
        tuning=TuningConfig(**tuning),
        **changes,
    )


def model_of(settings: TrainedRoleConfig) -> PackedModel:
    scores = Path(settings.model.path).name.startswith("score")
    return load_scorer(settings.model) if scores else load_causal_lm(settings.model)


def logits(engine: TrainEngine, seed: int = 100) -> Tensor:
    batch = [programs.pack(programs.batch(seed))]
    return engine.forward(batch, lambda model, pack: torch.as_tensor(model(*pack)))[0]


def learn(engine: TrainEngine, own: RankContext, steps: range, rows_per_pack: int = 2) -> list[dict[str, float]]:
    """Next tokens, or scores that shall be 1."""
    reports = []
    for step in steps:
        rows = programs.batch(step)
        num_tokens = sum(len(row) - 1 for row in rows)

        def score_loss(model: nn.Module, pack: Any, num_tokens: int = num_tokens) -> Any:
            tokens, positions = pack
            scores = model(tokens, positions, (positions > 0).nonzero()[:, 0])
            return (scores - 1).square().sum() / num_tokens, {}

        scores = hasattr(engine._model, "head_name")
        loss = score_loss if scores else programs.token_loss(num_tokens)
        reports.append(engine.step(programs.deal(rows, own, rows_per_pack), loss, 1e-2))
    return reports


def train(own: RankContext, folder: Path, stage: int, method: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Three steps, the reference scored between them; what the engine gives before and after."""
    settings = config(folder, stage, method, **changes)
    model = model_of(settings)
    base = model(*programs.pack(programs.batch(100))).detach()
    engine = TrainEngine(model, own, settings)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    started = logits(engine)
    first = programs.weights(engine)
    reports = learn(engine, own, range(1))
    with engine.adapter_off():
        off = logits(engine)
    reports += learn(engine, own, range(1, 3))
    after = logits(engine)
    return {
        "base": base,
        "started": started,
        "first": first,
        "off": off,
        "reports": reports,
        "after": after,
        "weights": programs.weights(engine),
        "moved": [n for n, p in model.named_parameters() if n in frozen and not _same_bytes(p, frozen[n])],
        "trained": [n for n, p in model.named_parameters() if p.requires_grad],
    }


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """4 bits are kept as if they were floats, some of which are not numbers and so not equal to themselves."""
    return torch.equal(one.detach().view(torch.uint8), other.view(torch.uint8))


def resume(own: RankContext, folder: Path, stage: int, method: str, checkpoint: Path, changes: dict[str, Any]) -> bool:
    """Two steps, a checkpoint and two more in a fresh engine are four steps, to the last bit?"""
    settings = config(folder, stage, method, **changes)
    torch.manual_seed(3)
    whole = TrainEngine(model_of(settings), own, settings)
    expected = learn(whole, own, range(4))
    first = TrainEngine(model_of(settings), own, settings)
    learn(first, own, range(2))
    first.save(checkpoint)
    second = TrainEngine(model_of(settings), own, settings)
    second.load(checkpoint)
    resumed = learn(second, own, range(2, 4))
    assert resumed == expected[2:], (resumed, expected[2:])
    one, other = programs.weights(whole), programs.weights(second)
    return all(torch.equal(one[name], other[name]) for name in one)


def export(own: RankContext, folder: Path, stage: int, method: str, target: Path, changes: dict[str, Any]) -> Tensor:
    """Three steps, then both exports: ``merged`` and ``adapter``. The logits they shall give."""
    settings = config(folder, stage, method, **changes)
    engine = TrainEngine(model_of(settings), own, settings)
    learn(engine, own, range(3))
    engine.export(target / "merged", load_tokenizer(settings.model))
    engine.export_adapter(target / "adapter")
    return logits(engine)


def learn_family(
    own: RankContext, folder: Path, stage: int, method: str, target: Path, changes: dict[str, Any], rows: Any
) -> tuple[list[float], Tensor]:
    """Losses of five updates on the same tokens, and the logits of ``rows`` after an export into ``target``."""
    settings = config(folder, stage, method, **changes)
    engine = TrainEngine(model_of(settings), own, settings)
    losses = [learn(engine, own, range(1))[0]["loss"] for _ in range(5)]
    engine.export(target, load_tokenizer(settings.model))
    logits = engine.forward([programs.pack(rows)], lambda model, pack: torch.as_tensor(model(*pack)))
    return losses, logits[0]


def train_in_shards(own: RankContext, folder: Path, method: str, changes: dict[str, Any]) -> dict[str, Any]:
    """``train`` under stage 3 with no parameter held whole longer than it is computed with."""

    def settings(config: TrainedRoleConfig, context: RankContext) -> dict[str, Any]:
        told = training_settings(config, context)
        told["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
        return told

    with mock.patch("actors.deepspeed_engine.training_settings", settings):
        return train(own, folder, 3, method, changes)


def adapter_of_full(own: RankContext, folder: Path, target: Path) -> None:
    settings = programs.config(folder, 0)
    TrainEngine(model_of(settings), own, settings).export_adapter(target)


def policy(
    own: RankContext, folder: Path, stage: int, method: str, temperature: float = 1.0, **changes: Any
) -> PolicyActor:
    """A policy after three updates, the same each time."""
    settings = config(folder, stage, method, max_tokens_per_pack=128, **changes)
    sampling = SamplingConfig(max_response_tokens=24, temperature=temperature)
    actor = PolicyActor(own, PolicyConfig(**dict(settings)), OnlineConfig(), sampling, 3, 4)
    learn(actor._engine, own, range(3))
    return actor


def publish_apart(
    own: RankContext,
    folder: Path,
    stage: int,
    method: str,
    changes: dict[str, Any],
    num_steps: int,
    parts: tuple[WeightPart, ...],
    version: int,
) -> tuple[list[WeightBucket], WeightManifest]:
    """What the first rank sends of a policy that has learnt ``num_steps`` more."""
    actor = policy(own, folder, stage, method, **changes)
    learn(actor._engine, own, range(3, 3 + num_steps))
    if own.rank > 0:
        actor.join_gather(20_000, parts)
        return [], actor.weight_manifest(version)
    return list(actor.weight_buckets(20_000, parts)), actor.weight_manifest(version)


def logprobs_after(
    own: RankContext,
    folder: Path,
    stage: int,
    method: str,
    changes: dict[str, Any],
    num_steps: int,
    rollouts: list[pa.RecordBatch],
) -> list[list[float]]:
    """Of this rank's rows, under a policy that has learnt ``num_steps`` more."""
    actor = policy(own, folder, stage, method, **changes)
    learn(actor._engine, own, range(3, 3 + num_steps))
    logprobs: list[list[float]] = actor.score(rollouts)[0].column(1).to_pylist()
    return logprobs


def publish(own: RankContext, folder: Path, stage: int, method: str) -> tuple[list[WeightBucket], WeightManifest]:
    """What the first rank sends; and it is what it said it would send."""
    actor = policy(own, folder, stage, method)
    if own.rank > 0:
        actor.join_gather(20_000)
        return [], actor.weight_manifest(1)
    buckets = list(actor.weight_buckets(20_000))
    sent = [(entry.name, entry.dtype, entry.shape) for bucket in buckets for entry in bucket.entries]
    assert [(meta.name, meta.dtype, meta.shape) for meta in actor.weight_layout()] == sent
    return buckets, actor.weight_manifest(1)


def both_logprobs(
    own: RankContext, folder: Path, stage: int, method: str, rollouts: list[pa.RecordBatch]
) -> tuple[list[list[float]], list[list[float]]]:
    """Of this rank's rows: the policy's log-probs, and its base's."""
    actor = policy(own, folder, stage, method)
    reference, _ = actor.score_reference(rollouts)
    assert reference.schema.names[1] == "ref_logprobs"
    return actor.score(rollouts)[0].column(1).to_pylist(), reference.column(1).to_pylist()


def reference_scores(
    own: RankContext, folder: Path, stage: int, temperature: float, rollouts: list[pa.RecordBatch]
) -> list[list[float]]:
    """What the base of a trained policy gives this rank's rows."""
    batch, _ = policy(own, folder, stage, "lora", temperature).score_reference(rollouts)
    logprobs: list[list[float]] = batch.column(1).to_pylist()
    return logprobs
