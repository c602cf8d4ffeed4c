"""What DeepSpeed is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.zero_settings import training_settings
from tests.actors import engine_programs as programs
from tests.actors.ranks import context


def settings(stage: int, **changes: Any) -> dict[str, Any]:
    return training_settings(programs.config(Path("model"), stage, **changes), context(num_ranks=4))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_sums_gradients_in_float32(stage: int) -> None:
    told = settings(stage, dtype="bfloat16")
    assert told["bf16"] == {"enabled": True}
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in settings(stage)


def test_offload_is_passed_through() -> None:
    zero = settings(3, zero={"offload_optimizer": True, "offload_params": True})["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert settings(3)["zero_optimization"].keys() == {"stage", "overlap_comm", "contiguous_gradients"}


def test_an_update_is_one_step_and_no_kernel_is_compiled() -> None:
    told = settings(2, optimizer={"eps": 1e-6, "betas": (0.8, 0.9), "weight_decay": 0.1})
    assert told["managed_gradient_accumulation"] is False
    assert told["train_batch_size"] == 4 and told["gradient_accumulation_steps"] == 1
    parameters = told["optimizer"]["params"]
    assert parameters["torch_adam"] is True
    assert (parameters["eps"], parameters["betas"], parameters["weight_decay"]) == (1e-6, [0.8, 0.9], 0.1)
    assert told["gradient_clipping"] == 0.5
    assert settings(0)["gradient_clipping"] == 0.0  # the engine clips there
