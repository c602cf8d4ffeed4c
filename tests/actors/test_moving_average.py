"""The moving average of weights in training: that of a plain loop, under any sharding, through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from pydantic import ValidationError

from actors.config import Dtype, PolicyConfig
from tests.actors import moving_average_programs as programs
from tests.actors import role_programs
from tests.actors.experience_batches import rollout, rows_of
from tests.actors.ranks import Ranks, context


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
    assert len([part for part in said if "set ema_decay" in part]) == 2
    assert [part for part in said if "has no moving average" in part]


LORA = {"tuning": {"method": "lora"}}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({**LORA, "ema_decay": 0.9}, r"ema_decay needs tuning\.method full, not lora"),
        ({**LORA, "ema_is_reference": True}, r"ema_is_reference needs tuning\.method full, not lora"),
        ({"ema_is_reference": True}, "ema_is_reference needs the moving average that it names: set ema_decay"),
    ],
)
def test_what_cannot_be_averaged_is_refused(settings: dict[str, object], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        PolicyConfig.model_validate({"model": {"path": "m"}, "optimizer": {"learning_rate": 1}, **settings})


def test_it_takes_the_place_of_the_weights_and_gives_it_back(models: Path, two_ranks: Ranks) -> None:
    assert two_ranks.run(programs.in_place, models / "qwen2") == [(True, True, True)] * 2


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "bfloat16"), (3, "float32")])
def test_it_is_the_reference(stage: int, dtype: Dtype, models: Path, two_ranks: Ranks, tmp_path: Path) -> None:
    """Log-probs of a model that is loaded with the average; and the policy does not notice."""
    rollouts = [rollout(8, seed=1), rollout(5, seed=2, first_id=8)]
    results = two_ranks.run(programs.refer, models / "qwen2", stage, dtype, rollouts, tmp_path)
    found = [row for part in results for row in part]
    if dtype == "float32":  # in bfloat16 numbers depend on how rows are packed
        loaded = role_programs.reference(context(role="reference"), tmp_path / "ema")
        expected = rows_of([loaded.score(rollouts)[0]], "ref_logprobs")
        for row, right in zip(found, expected, strict=True):
            assert row == pytest.approx(right, abs=1e-5)
