"""What the role tests run in each rank's process. Every function takes the rank's context first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from actors.config import (
    CriticConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    ReferenceConfig,
    RewardConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainedRoleConfig,
    ZeroConfig,
)
from actors.critic import CriticActor
from actors.learner import LearnerActor
from actors.policy import PolicyActor
from actors.reference import DataReferenceActor, ReferenceActor
from actors.reports import ColumnInfo, TrainReport
from actors.reward import RewardActor
from actors.weights import unpack
from algorithms.config import LearningConfig, OnlineConfig, RewardModelConfig, SupervisedConfig
from cluster.context import RankContext

NUM_ITERATIONS = 4
TEMPERATURE = 0.7
PACK = 48


def trained(folder: Path, stage: int, rate: float = 1e-3, **model: Any) -> dict[str, Any]:
    """Arguments of a trained role's configuration."""
    return {
        "model": ModelConfig(path=str(folder), **({"dtype": "float32"} | model)),
        "zero": ZeroConfig(stage=stage),
        "optimizer": OptimizerConfig(learning_rate=rate, eps=1e-5),
        "max_tokens_per_pack": PACK,
    }


def sampling() -> SamplingConfig:
    return SamplingConfig(max_response_tokens=16, temperature=TEMPERATURE)


def policy(own: RankContext, folder: Path, stage: int = 1, **algorithm: Any) -> PolicyActor:
    config = PolicyConfig(**trained(folder, stage))
    return PolicyActor(own, config, OnlineConfig(**algorithm), sampling(), 3, NUM_ITERATIONS)


def critic(own: RankContext, folder: Path, stage: int = 1, **algorithm: Any) -> CriticActor:
    return CriticActor(own, CriticConfig(**trained(folder, stage)), OnlineConfig(**algorithm), 3, NUM_ITERATIONS)


def reward(own: RankContext, folder: Path, tokenizer: Path, sharding: str = "replicas") -> RewardActor:
    model = ModelConfig(path=str(folder), dtype="float32")
    config = RewardConfig(model=model, sharding=sharding, max_tokens_per_pack=PACK)
    return RewardActor(own, config, ModelConfig(path=str(tokenizer)))


def reference(own: RankContext, folder: Path, sharding: str = "replicas") -> ReferenceActor:
    model = ModelConfig(path=str(folder), dtype="float32")
    return ReferenceActor(own, ReferenceConfig(model=model, sharding=sharding, max_tokens_per_pack=PACK), sampling())


def learner(own: RankContext, folder: Path, name: str, stage: int = 1, **model: Any) -> LearnerActor:
    config = TrainedRoleConfig(**trained(folder, stage, 1e-2, **model))
    kind: type[LearningConfig] = RewardModelConfig if name == "reward_model" else SupervisedConfig
    return LearnerActor(own, config, kind(name=name, batch_size=8), 3)


def policy_scores(
    own: RankContext, folder: Path, stage: int, rollouts: list[pa.RecordBatch]
) -> tuple[pa.RecordBatch, ColumnInfo]:
    return policy(own, folder, stage).score(rollouts)


def critic_scores(
    own: RankContext, folder: Path, stage: int, rollouts: list[pa.RecordBatch]
) -> tuple[pa.RecordBatch, ColumnInfo]:
    return critic(own, folder, stage).score(rollouts)


def reference_scores(
    own: RankContext, folder: Path, sharding: str, rollouts: list[pa.RecordBatch]
) -> tuple[pa.RecordBatch, ColumnInfo]:
    return reference(own, folder, sharding).score(rollouts)


def data_reference(
    own: RankContext, folder: Path, sharding: str, batches: list[pa.RecordBatch]
) -> tuple[str, list[pa.RecordBatch]]:
    """Digest and columns of a reference that scores a data set."""
    config = ReferenceConfig(
        model=ModelConfig(path=str(folder), dtype="float32"), sharding=sharding, max_tokens_per_pack=PACK
    )
    actor = DataReferenceActor(own, config)
    return actor.model_digest(), [actor.score(batch)[0] for batch in batches]


def reward_scores(
    own: RankContext, folder: Path, tokenizer: Path, sharding: str, rollouts: list[pa.RecordBatch]
) -> tuple[pa.RecordBatch, ColumnInfo]:
    return reward(own, folder, tokenizer, sharding).score(rollouts)


def train_policy(
    own: RankContext,
    folder: Path,
    stage: int,
    rollouts: list[pa.RecordBatch],
    credit: pa.RecordBatch,
    algorithm: dict[str, Any],
) -> tuple[list[TrainReport], list[list[float]]]:
    """Reports of two iterations on the same batch, and the log-probs afterwards (of this rank's rows)."""
    actor = policy(own, folder, stage, **algorithm)
    reports = [actor.train(iteration, rollouts, [credit]) for iteration in range(2)]
    return reports, actor.score(rollouts)[0].column("policy_logprobs").to_pylist()


def train_with_text(
    own: RankContext,
    folder: Path,
    stage: int,
    rollouts: list[pa.RecordBatch],
    credit: pa.RecordBatch,
    text: list[pa.RecordBatch],
    algorithm: dict[str, Any],
) -> TrainReport:
    """One iteration with pre-training text mixed in."""
    return policy(own, folder, stage, **algorithm).train(0, rollouts, [credit], pretraining=text)


def train_critic(
    own: RankContext,
    folder: Path,
    stage: int,
    rollouts: list[pa.RecordBatch],
    values: pa.RecordBatch,
    credit: pa.RecordBatch,
    num_iterations: int,
) -> list[TrainReport]:
    actor = critic(own, folder, stage, num_epochs=2, num_minibatches=2, clip_value=None)
    return [actor.train(iteration, rollouts, [values], [credit]) for iteration in range(num_iterations)]


def learn(
    own: RankContext, folder: Path, name: str, stage: int, batches: list[pa.RecordBatch], export: Path | None
) -> tuple[list[TrainReport], dict[str, float], dict[str, float]]:
    """Reports of one update a batch, and evaluations of the first batch before and after."""
    actor = learner(own, folder, name, stage)
    before = actor.evaluate(batches[:1])
    reports = [actor.train(update, len(batches), batch) for update, batch in enumerate(batches)]
    if export is not None:
        actor.export(export)
    return reports, before, actor.evaluate(batches[:1])


def set_labels(folder: Path, labels: list[str]) -> None:
    """Change the labels in a model folder's configuration."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["id2label"] = {str(number): label for number, label in enumerate(labels)}
    config["label2id"] = {label: number for number, label in enumerate(labels)}
    file.write_text(json.dumps(config))


def sent_weights(own: RankContext, folder: Path, stage: int) -> dict[str, Any]:
    """What arrives of the weights that this rank sends."""
    actor = policy(own, folder, stage)
    if own.rank > 0:
        actor.join_gather(20_000)
        return {}
    buckets = list(actor.weight_buckets(20_000))
    manifest = actor.weight_manifest(7)
    assert (manifest.version, manifest.num_parameters) == (7, sum(len(bucket.entries) for bucket in buckets))
    return {
        name: tensor for bucket in buckets for name, tensor in unpack(torch.from_numpy(bucket.payload), bucket.entries)
    }


def rates(own: RankContext, folder: Path, rollouts: list[pa.RecordBatch], credit: pa.RecordBatch) -> list[float]:
    """Learning rates of the policy in a whole run with a linear schedule, whose first iteration is the critic's."""
    schedule = ScheduleConfig(shape="linear", final_fraction=0.1)
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule=schedule)
    config = PolicyConfig(**(trained(folder, 1) | {"optimizer": optimizer}))
    algorithm = OnlineConfig(critic_warmup_iterations=1)
    actor = PolicyActor(own, config, algorithm, sampling(), 3, NUM_ITERATIONS)
    return [actor.train(i, rollouts, [credit]).metrics["learning_rate"] for i in range(1, NUM_ITERATIONS)]


def layout_and_weights(own: RankContext, folder: Path, stage: int) -> tuple[list[Any], list[Any]]:
    """What the policy says it sends, and what it would."""
    actor = policy(own, folder, stage)
    sent = [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for parameters in actor._engine.weights(10_000)
        for name, tensor in parameters
    ]
    return [(meta.name, meta.dtype, meta.shape) for meta in actor.weight_layout()], sent
