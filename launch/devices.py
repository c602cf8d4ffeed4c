"""What a role's device lets it do. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from actors.config import ModelConfig
from cluster.config import ClusterConfig, PlacementConfig
from launch.errors import Problem


def runs_on_gpu(placement: PlacementConfig, cluster: ClusterConfig) -> bool:
    """Whether a role's ranks compute on GPUs: an accelerator resource of another name only stands for one."""
    return placement.gpus_per_rank > 0 and cluster.accelerator_resource == "GPU"


def model_role_problems(
    name: str, role: PlacementConfig, model: ModelConfig, cluster: ClusterConfig
) -> Iterator[Problem]:
    """What stands between a role with a model and its device; ``name`` is where the role stands."""
    if role.gpus_per_rank > 1:
        yield Problem(
            f"{name}.gpus_per_rank", f"{role.gpus_per_rank:g}, but a rank of this role computes on one GPU",
            "1, and more in ranks_per_node",
        )
    if model.attention == "flash_attention_2":
        if not runs_on_gpu(role, cluster):
            yield Problem(f"{name}.model.attention", "flash_attention_2 needs a GPU and this role has none", "sdpa")
        elif model.dtype == "float32":
            yield Problem(
                f"{name}.model.attention", "flash_attention_2 does not compute in float32", "dtype bfloat16, or sdpa"
            )
