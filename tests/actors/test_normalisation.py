"""A normalised reward model has mean 0, and deviation 1 where asked for, wherever it is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, pstdev

import pyarrow as pa
import pytest
import torch
import transformers

from actors.config import ModelConfig
from actors.errors import RoleError
from actors.models import SCORE_BIAS, load_scorer
from actors.normalisation import ScoreMap, score_map
from algorithms.config import RewardModelConfig
from cluster.context import RankContext
from experience.tensors import list_column
from tests.actors import comparison_programs as programs
from tests.actors import tiny_models
from tests.actors.ranks import Ranks, context

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CONFIG = RewardModelConfig(batch_size=8)


def rows() -> pa.RecordBatch:
    return programs.ranked([[0, 1]] * 9, seed=5)


def served(folder: Path) -> list[float]:
    """Scores as the reward role and the critic load the model."""
    model = load_scorer(ModelConfig(path=str(folder), dtype="float32"))
    tokens = list_column(rows(), "tokens")
    found = []
    for row in range(tokens.num_rows):
        ids = tokens.row(row).long()
        with torch.no_grad():
            found.append(model(ids, torch.arange(len(ids)), torch.tensor([len(ids) - 1])).item())
    return found


def normalised(own: RankContext, folder: Path, stage: int, out: Path, unit_std: bool) -> ScoreMap:
    """Train a little, and export what is normalised on ``rows()``."""
    actor = programs.learner(own, folder, CONFIG, stage)
    actor.train(0, 2, rows())
    mapped = actor.measure_scores(rows(), unit_std)
    actor.export(out, mapped)
    return mapped


def test_the_map_by_hand() -> None:
    """Scores 1, 3 and 8: mean 4, squared distances 9, 1 and 16."""
    assert score_map(3, 12.0, 26.0, unit_std=False) == ScoreMap(1.0, -4.0, 4.0, math.sqrt(26 / 3), 3)
    std = math.sqrt(26 / 3)
    found = score_map(3, 12.0, 26.0, unit_std=True)
    assert (found.gain, found.bias) == pytest.approx((1 / std, -4 / std))
    assert score_map(2, 6.0, 0.0, unit_std=False).bias == -3.0
    with pytest.raises(RoleError, match="all 2 scores are 3"):
        score_map(2, 6.0, 0.0, unit_std=True)
    for moments in ((0, 0.0, 0.0), (2, math.nan, 0.0)):
        with pytest.raises(RoleError, match="cannot be normalised"):
            score_map(*moments, unit_std=False)


@pytest.mark.parametrize("unit_std", [False, True])
def test_plain_transformers_finds_mean_0(unit_std: bool, tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "score", head="score")
    before = programs.plain_scores(folder, rows())
    assert abs(fmean(before)) > 0.01
    mapped = normalised(context(), folder, 1, tmp_path / "out", unit_std)
    constant = transformers.AutoConfig.from_pretrained(tmp_path / "out").troupe_score_bias
    assert constant == mapped.bias
    plain = [score + constant for score in programs.plain_scores(tmp_path / "out", rows())]
    assert fmean(plain) == pytest.approx(0, abs=1e-5)
    assert pstdev(plain) == pytest.approx(1.0 if unit_std else mapped.std, rel=1e-5)
    assert served(tmp_path / "out") == pytest.approx(plain, abs=1e-5)
    # Trained further and normalised again, it starts from the scores that it gave.
    again = normalised(context(), tmp_path / "out", 1, tmp_path / "again", unit_std)
    assert fmean(served(tmp_path / "again")) == pytest.approx(0, abs=1e-5)
    assert again.num_rows == 18


def test_a_head_with_a_bias_takes_it(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "token", head="token_score")
    mapped = normalised(context(), folder, 1, tmp_path / "out", True)
    found = served(tmp_path / "out")
    assert (fmean(found), pstdev(found)) == pytest.approx((0, 1), abs=1e-5)
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path / "out"), SCORE_BIAS)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    old = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    assert model.score.bias.item() != pytest.approx(old.score.bias.item()) and mapped.gain != 1


def test_ranks_measure_the_same(tmp_path: Path, two_ranks: Ranks) -> None:
    folder = tiny_models.write(tmp_path / "score", head="score")
    alone = normalised(context(), folder, 1, tmp_path / "alone", True)
    first, second = two_ranks.run(normalised, folder, 3, tmp_path / "out", True)
    assert first == second
    for name, value in vars(first).items():
        assert value == pytest.approx(vars(alone)[name], rel=1e-3)
    found = served(tmp_path / "out")
    assert (fmean(found), pstdev(found)) == pytest.approx((0, 1), abs=1e-5)


def test_a_new_head_has_no_bias_of_an_old_one(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "score", head="score")
    normalised(context(), folder, 1, tmp_path / "out", False)
    fresh = load_scorer(ModelConfig(path=str(tmp_path / "out"), dtype="float32", from_scratch=True))
    assert fresh.score_bias == 0
