"""The moving average of weights in training: that of a plain loop, under any sharding, through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from pydantic import ValidationError

from actors.config import PolicyConfig
from tests.actors import moving_average_programs as programs
from tests.actors.ranks import Ranks


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "bfloat16"), (3, "float32")])
def test_it_follows_the_weights(stage: int, dtype: str, models: Path, two_ranks: Ranks, tmp_path: Path) -> None:
    results = two_ranks.run(programs.follow, models / "qwen2", stage, {"dtype": dtype}, tmp_path)
    for weights, averages, resumed in results:
        assert averages.keys() == weights[0].keys()
        for name, average in averages.items():
            expected = weights[0][name].float()
            for after in weights[1:]:
                expected = programs.DECAY * expected + (1 - programs.DECAY) * after[name].float()
            rtol = 1e-5 if dtype == "float32" else 2**-8
            torch.testing.assert_close(average, expected.to(average.dtype), rtol=rtol, atol=1e-6)
            torch.testing.assert_close(resumed[name], average, rtol=rtol, atol=1e-6)
        moved = [name for name, average in averages.items() if not torch.equal(average, weights[-1][name])]
        assert len(moved) > len(averages) / 2
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ema", dtype="auto")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, results[0][1][name])


def test_what_is_not_kept_is_refused(models: Path, one_rank: Ranks, tmp_path: Path) -> None:
    (said,) = one_rank.run(programs.refused, models / "qwen2", tmp_path)
    assert [part for part in said if "set ema_decay" in part]
    assert [part for part in said if "has no moving average" in part]
    with pytest.raises(ValidationError, match=r"ema_decay needs tuning\.method full, not lora"):
        PolicyConfig.model_validate(
            {"model": {"path": "m"}, "optimizer": {"learning_rate": 1}, "tuning": {"method": "lora"}, "ema_decay": 0.9}
        )
