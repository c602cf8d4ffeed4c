"""What adapters need of a model, judged from its layers alone, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from actors.config import TrainedRoleConfig
from launch.config import OnlineRunConfig, RewardModelRunConfig, RunConfig
from launch.devices import runs_on_gpu
from launch.errors import Problem
from launch.paths import resolve_model

if TYPE_CHECKING:
    from launch.check_models import Facts


def check_tuning(config: RunConfig, facts: Facts) -> Iterator[Problem]:
    """Whether the layers that are to be tuned are there. Adds how many to ``facts``."""
    for name, role, scores in _trained(config):
        if not role.tuning.has_adapter:
            continue
        # Builds the model's layers, so it needs torch: loaded only for runs that have an adapter.
        from actors.errors import ModelError
        from actors.models import outline
        from actors.tuning import require_tunable

        resolved = role.model_copy(update={"model": resolve_model(role.model)})
        device = "cuda" if runs_on_gpu(role, config.cluster) else "cpu"
        try:
            layers = require_tunable(outline(resolved.model, scores=scores), resolved, device)
        except ModelError as error:
            yield Problem(f"{name}.tuning", str(error))
        else:
            facts.append((f"{name}.tuning", f"{role.tuning.method} on {len(layers)} layers"))


def _trained(config: RunConfig) -> Iterator[tuple[str, TrainedRoleConfig, bool]]:
    """The trained roles, and whether their model gives scores."""
    if isinstance(config, OnlineRunConfig):
        yield "policy", config.policy, False
        if config.critic is not None:
            yield "critic", config.critic, True
    else:
        yield "learner", config.learner, isinstance(config, RewardModelRunConfig)
