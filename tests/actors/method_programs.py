"""Every method that trains a model, a few updates of it under some tuning and ZeRO stage, in each rank's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actors.config import (
    CriticConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    TrainedRoleConfig,
    TuningConfig,
    ZeroConfig,
)
from actors.critic import CriticActor
from actors.learner import LearnerActor
from actors.policy import PolicyActor
from algorithms.config import LearningConfig, OnlineConfig, PreferenceConfig, RewardModelConfig, SupervisedConfig
from cluster.context import RankContext
from tests.actors import experience_batches as batches
from tests.actors.comparison_programs import write_reference

METHODS = ("sft", "reward_model", "dpo", "policy", "critic")
#: Of a file of tiny models, the one that each method trains.
MODELS = {"reward_model": "score", "critic": "score"}
NUM_UPDATES = 4


def settings(folder: Path, method: str, tuning: str, stage: int) -> dict[str, Any]:
    """Arguments of the configuration of a trained role."""
    lora = {} if tuning == "full" else {"lora": LoRAConfig(rank=4, alpha=8.0)}
    return {
        "model": ModelConfig(path=str(folder / MODELS.get(method, "llama")), dtype="float32"),
        "zero": ZeroConfig(stage=stage),
        "tuning": TuningConfig(method=tuning, **lora),
        "optimizer": OptimizerConfig(learning_rate=3e-3 if tuning == "full" else 1e-2),
        "max_tokens_per_pack": 64,
    }


def run(own: RankContext, folder: Path, method: str, tuning: str, stage: int, scratch: Path) -> list[dict[str, float]]:
    """Metrics of the first update, of the last one, and afterwards. The first and the third have the same loss.

    It is that of a batch that is held out or was trained on; of the policy it is -sum(log-prob x advantage).
    """
    arguments = settings(folder, method, tuning, stage)
    match method:
        case "policy":
            return _policy(own, PolicyConfig(**arguments))
        case "critic":
            return _critic(own, CriticConfig(**arguments))
        case _:
            return _learner(own, TrainedRoleConfig(**arguments), method, scratch)


def _learner(own: RankContext, config: TrainedRoleConfig, method: str, scratch: Path) -> list[dict[str, float]]:
    kinds: dict[str, type[LearningConfig]] = {
        "sft": SupervisedConfig,
        "reward_model": RewardModelConfig,
        "dpo": PreferenceConfig,
    }
    actor = LearnerActor(own, config, kinds[method](name=method, batch_size=8), 3)
    batch = batches.examples(8) if method == "sft" else batches.comparisons(8)
    if method == "dpo":
        parts = _gathered(actor.score_reference(batch)[0].column("ref_logprob").to_pylist(), own)
        actor.use_reference(write_reference(parts, scratch / f"reference-{own.rank}.arrow"))
    before = actor.evaluate([batch])
    last: dict[str, float] = {}
    for update in range(NUM_UPDATES):
        last = dict(actor.train(update, NUM_UPDATES, batch).metrics)
    return [before, last, actor.evaluate([batch])]


def _policy(own: RankContext, config: PolicyConfig) -> list[dict[str, float]]:
    actor = PolicyActor(own, config, OnlineConfig(num_epochs=1, num_minibatches=1), _sampling(), 3, NUM_UPDATES)
    rollouts = [batches.rollout(8, seed=1)]
    reports, losses = [], []
    for iteration in range(NUM_UPDATES + 1):
        logprobs = _gathered(actor.score(rollouts)[0].column(1).to_pylist(), own)
        credit = batches.credit(rollouts, logprobs)  # the same advantages every time
        rows = zip(logprobs, credit.column("advantages").to_pylist(), strict=True)
        losses.append(-sum(logprob * advantage for row in rows for logprob, advantage in zip(*row, strict=True)))
        if iteration < NUM_UPDATES:
            reports.append(dict(actor.train(iteration, rollouts, [credit]).metrics))
    # The loss that is reported is at ratios of 1, where it is the advantages' mean whatever was learnt.
    return [reports[0] | {"loss": losses[0]}, reports[-1], {"loss": losses[-1]}]


def _critic(own: RankContext, config: CriticConfig) -> list[dict[str, float]]:
    algorithm = OnlineConfig(num_epochs=1, num_minibatches=1, clip_value=None)
    actor = CriticActor(own, config, algorithm, 3, NUM_UPDATES)
    rollouts = [batches.rollout(8, seed=1)]
    values = _gathered(actor.score(rollouts)[0].column(1).to_pylist(), own)
    credit = batches.credit(rollouts, values)
    column = batches.values(rollouts, values)
    reports = [dict(actor.train(i, rollouts, [column], [credit]).metrics) for i in range(NUM_UPDATES)]
    return [reports[0], reports[-1], reports[-1]]


def _sampling() -> SamplingConfig:
    return SamplingConfig(max_response_tokens=16)


def _gathered(rows: list[Any], own: RankContext) -> list[Any]:
    """All ranks' rows, in the order of the ranks."""
    parts: list[Any] = [None] * own.num_ranks
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
