"""From our configuration of a role to DeepSpeed's. Pure."""

from __future__ import annotations

from typing import Any

from torch import nn

from actors.config import ScorerConfig, TrainedRoleConfig
from cluster.context import RankContext


def training_settings(config: TrainedRoleConfig, context: RankContext) -> dict[str, Any]:
    """DeepSpeed's configuration of a trained role."""
    optimizer, zero = config.optimizer, config.zero
    bfloat16 = config.model.dtype == "bfloat16"
    offload = {"device": "cpu", "pin_memory": context.device == "cuda"}
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": context.device == "cuda" and zero.stage >= 2,
        "contiguous_gradients": True,
    }
    if zero.offload_optimizer:
        sharding["offload_optimizer"] = offload
    if zero.offload_params:
        sharding["offload_param"] = offload
    settings = _common_settings(context, config.model.dtype) | {
        "zero_optimization": sharding,
        # One `step` is one update, however many micro-batches came before it.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if zero.stage == 0 and not bfloat16 else optimizer.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                # PyTorch's fused kernel, on CPU and GPU: DeepSpeed's own would be compiled at start-up.
                "torch_adam": True,
                "fused": True,
            },
        },
    }
    if bfloat16 and zero.stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def forward_settings(config: ScorerConfig, context: RankContext) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that is sharded and only runs forward."""
    sharding = {"stage": 3, "overlap_comm": context.device == "cuda"}
    return _common_settings(context, config.model.dtype) | {"zero_optimization": sharding}


def _common_settings(context: RankContext, dtype: str) -> dict[str, Any]:
    return {
        "train_batch_size": context.num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "bf16": {"enabled": dtype == "bfloat16"},
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's: weight decay for matrices alone, not for biases, nor for the gains of norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
