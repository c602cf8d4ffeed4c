"""Methods x tuning x ZeRO: every combination that is not refused trains, and sharding changes no number."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.actors import method_programs, tiny_models
from tests.actors.method_programs import METHODS
from tests.actors.ranks import Ranks

TUNINGS = ("full", "lora", "qlora")
STAGES = (1, 2, 3)
#: Each stage with each method and each tuning, though not with each pair of them.
SQUARE = [
    (method, tuning, STAGES[(row + column) % 3])
    for row, method in enumerate(METHODS)
    for column, tuning in enumerate(TUNINGS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers wide enough for blocks of 64."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_models.write(folder / "llama", "llama", tied=False, width=64)
    tiny_models.write(folder / "score", "qwen2", head="score", width=64)
    return folder


def trained(
    method: str, tuning: str, stage: int, folder: Path, ranks: Ranks, scratch: Path
) -> list[dict[str, float]]:
    """What all ranks report alike; and it has learnt."""
    results: list[list[dict[str, float]]] = ranks.run(method_programs.run, folder, method, tuning, stage, scratch)
    for report in results[0]:
        report.pop("tokens_per_second", None)
    before, last, after = results[0]
    for other in results[1:]:
        assert [part["loss"] for part in other] == [before["loss"], last["loss"], after["loss"]]
    assert all(math.isfinite(value) for value in last.values())
    assert after["loss"] < before["loss"]
    if method == "policy":
        assert before["first_ratio_max_deviation"] < 1e-4
    if method == "dpo":
        assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    return results[0]


@pytest.mark.parametrize(("method", "tuning", "stage"), SQUARE)
def test_it_trains(method: str, tuning: str, stage: int, folder: Path, two_ranks: Ranks, tmp_path: Path) -> None:
    trained(method, tuning, stage, folder, two_ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("method", METHODS)
def test_stages_agree(
    method: str, tuning: str, folder: Path, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Over two ranks each gives what one rank gives alone."""
    alone = trained(method, tuning, 0, folder, one_rank, tmp_path)
    for stage in STAGES:
        for found, expected in zip(trained(method, tuning, stage, folder, two_ranks, tmp_path), alone, strict=True):
            # Rounding; and of margins that are 0 but for rounding, on which side of 0 they are.
            noisy = {"first_ratio_max_deviation", "first_logprob_gap", "reward_accuracy"}
            kept = [name for name in expected if name not in noisy]
            assert {name: found[name] for name in kept} == pytest.approx(
                {name: expected[name] for name in kept}, rel=1e-3, abs=1e-5
            )
