"""Reward models from K-wise comparisons: the loss is that of each response scored alone, whatever packs and ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.comparisons import Comparisons
from actors.config import ModelConfig
from actors.models import load_scorer
from actors.ranking import NUM_BINS, RankedBatch, RewardRanking
from algorithms.config import RewardModelConfig
from experience.schema import SchemaError
from tests.actors import comparison_programs as programs
from tests.actors import tiny_models
from tests.actors.experience_batches import comparisons
from tests.actors.ranks import Ranks, context
from tests.algorithms import slow_ranking

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

RANKS = [[0, 1, 1, 2], [0, 1], [0, 0, 1], [0, 1, 2, 2], [0, 0], [0, 1], [0, 1, 1]]
MARGINS = [0.5, 0.0, 1.0, 0.25, 0.0, 2.0, 0.0]
RATINGS = ["slightly", "much", "", "slightly", "much", "much", ""]
PAIRS = [[0, 1], [0, 1], [0, 0], [0, 1], [0, 1]]
PREFERENCES = [1.0, 0.75, 0.5, 0.9, 0.25]
CPU = torch.device("cpu")


def config(**changes: Any) -> RewardModelConfig:
    return RewardModelConfig(batch_size=8, **changes)


def batch(**changes: Any) -> pa.RecordBatch:
    arguments: dict[str, Any] = {"margins": MARGINS, "ratings": RATINGS} | changes
    return programs.ranked(RANKS, **arguments)


def batch_of(loss: str) -> pa.RecordBatch:
    return programs.ranked(PAIRS, preferences=PREFERENCES) if loss == "soft_labels" else batch()


def scores_by_comparison(folder: Path, rows: pa.RecordBatch) -> list[list[float]]:
    return programs.by_comparison(rows, programs.plain_scores(folder, rows))


def prompts_of(folder: Path, rows: pa.RecordBatch) -> list[slow_ranking.Prompt]:
    ranks = programs.by_comparison(rows, rows.column("rank").to_pylist())
    tensors = [[torch.tensor(s, dtype=torch.float64) for s in scores] for scores in scores_by_comparison(folder, rows)]
    return list(zip(tensors, ranks, strict=True))


@pytest.fixture(scope="module")
def score(models: Path) -> Path:
    return models / "score"


@pytest.fixture(scope="module")
def expected(score: Path) -> dict[str, float]:
    """Loss and metrics of ``ranking`` on ``batch()``, in loops over single responses."""
    loss, metrics, count = slow_ranking.kwise(prompts_of(score, batch()), MARGINS)
    assert count == len(RANKS) - 1
    return {"loss": loss.item(), **metrics}


def test_ranking_loss_is_that_of_responses_scored_alone(score: Path, expected: dict[str, float]) -> None:
    actor = programs.learner(context(), score, config())
    found = actor.evaluate([batch()])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert actor.evaluate([batch().slice(0, 9), batch().slice(9)])["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found == actor.evaluate([batch()])
    report = actor.train(0, 1, batch())
    assert report.metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert report.num_tokens == sum(map(len, batch().column("tokens").to_pylist()))


def test_margins_are_of_the_data(score: Path, expected: dict[str, float]) -> None:
    bare, _, _ = slow_ranking.kwise(prompts_of(score, batch()), [0.0] * len(RANKS))
    actor = programs.learner(context(), score, config())
    found = actor.evaluate([batch(margins=None)])
    assert found["loss"] == pytest.approx(bare.item(), rel=1e-5)
    assert expected["loss"] - found["loss"] > 0.1
    assert found["margin"] == pytest.approx(expected["margin"], rel=1e-5)


def test_soft_labels(score: Path) -> None:
    rows = batch_of("soft_labels")
    losses, right = [], []
    for (a, b), p in zip(scores_by_comparison(score, rows), PREFERENCES, strict=True):
        sigmoid = 1 / (1 + math.exp(b - a))
        losses.append(-p * math.log(sigmoid) - (1 - p) * math.log(1 - sigmoid))
        right.append(0.5 if p == 0.5 else float((a > b) == (p > 0.5)))
    found = programs.learner(context(), score, config(loss="soft_labels")).evaluate([rows])
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))


def test_best_of(score: Path) -> None:
    rows = batch()
    loss, metrics, _ = slow_ranking.best_of(prompts_of(score, rows))
    found = programs.learner(context(), score, config(loss="best_of")).evaluate([rows])
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {name: found[name] for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", ["ranking", "soft_labels", "best_of"])
def test_centring_is_added(loss: str, score: Path) -> None:
    rows = batch_of(loss)
    squares = [
        (2 * sum(s.item() for s in scores) / len(scores)) ** 2
        for scores, ranks in prompts_of(score, rows)
        if len(set(ranks)) > 1 or loss == "soft_labels"  # which learns from ties too
    ]
    plain = programs.learner(context(), score, config(loss=loss)).evaluate([rows])
    found = programs.learner(context(), score, config(loss=loss, centring_coefficient=0.3)).evaluate([rows])
    assert "centring" not in plain
    assert found["centring"] == pytest.approx(0.3 * sum(squares) / len(squares), rel=1e-5)
    assert found["loss"] == pytest.approx(plain["loss"] + found["centring"], rel=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "bloom"])
def test_scores_depend_on_nothing_beside_them(kind: str, tmp_path: Path) -> None:
    """Nor does a pad token that is EOS, of which responses hold several, hide anything."""
    folder = tiny_models.write(tmp_path / "score", kind, head="score")
    settings = json.loads((folder / "config.json").read_text())
    rows = batch()
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": 0, "eos_token_id": 1}))
    expected = scores_by_comparison(folder, rows)
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": 1, "eos_token_id": 1}))
    # Transformers reads another token then, unless the model is exported from here.
    assert scores_by_comparison(folder, rows)[0] != pytest.approx(expected[0], abs=1e-2)
    attention = "eager" if kind == "bloom" else "sdpa"
    inner = load_scorer(ModelConfig(path=str(folder), dtype="float32", attention=attention))
    assert inner.padded == (kind == "bloom")
    model = programs.Spy(inner)
    objective, prepared = RewardRanking(config()), RankedBatch([rows], "ranking")
    for units in ([0], [5], [6, 2, 4], list(range(7)), list(reversed(range(7)))):
        objective.loss(model, prepared.pack(units, CPU), 7)
        wanted = [score for unit in units for score in expected[unit]]
        assert model.seen.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_the_budget_of_a_pack_changes_nothing(score: Path) -> None:
    longest = max(RankedBatch([batch()], "ranking").unit_lengths)
    found = [
        programs.learner(context(), score, config(centring_coefficient=0.1), max_tokens=budget).evaluate([batch()])
        for budget in (longest, 60, 1000)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-5, abs=1e-6)


def close(one: programs.Learned, other: programs.Learned) -> bool:
    """Both learnt the same, but for the order in which floats were added."""
    (before, reports, after), (own_before, own_reports, own_after) = one, other
    assert before == pytest.approx(own_before, rel=1e-4, abs=1e-5)
    for report, own_report in zip(reports, own_reports, strict=True):
        assert report == pytest.approx(own_report, rel=1e-3, abs=1e-4)
    assert after["loss"] != pytest.approx(before["loss"], rel=1e-2)
    return bool(after["loss"] == pytest.approx(own_after["loss"], rel=1e-3, abs=1e-4))


@pytest.mark.parametrize(("loss", "stage"), [("ranking", 3), ("soft_labels", 1), ("best_of", 1)])
def test_one_rank_and_two_learn_the_same(
    loss: str, stage: int, score: Path, two_ranks: Ranks, one_rank: Ranks
) -> None:
    batches = [batch_of(loss)] * 2
    settings = config(loss=loss, centring_coefficient=0.01)
    (alone,) = one_rank.run(programs.learn, score, settings, 1, batches)
    first, second = two_ranks.run(programs.learn, score, settings, stage, batches)
    assert first == second
    assert close(alone, first)


@pytest.mark.parametrize(("loss", "stage"), [("ranking", 1), ("ranking", 3), ("soft_labels", 3), ("best_of", 3)])
def test_a_rank_without_a_comparison_takes_part(
    loss: str, stage: int, score: Path, two_ranks: Ranks, one_rank: Ranks
) -> None:
    one = programs.ranked([[0, 1]], preferences=[0.8], ratings=["much"], seed=5)
    settings = config(loss=loss, centring_coefficient=0.01)
    (alone,) = one_rank.run(programs.learn, score, settings, 1, [one])
    first, second = two_ranks.run(programs.learn, score, settings, stage, [one])
    assert first == second
    assert close(alone, first)


@pytest.mark.parametrize("loss", ["ranking", "best_of", "soft_labels"])
def test_an_empty_pack_adds_nothing(loss: str, score: Path) -> None:
    rows = batch_of(loss)
    model = load_scorer(ModelConfig(path=str(score), dtype="float32"))
    objective = RewardRanking(config(loss=loss, centring_coefficient=1.0))
    empty = objective.batch([rows]).pack([], CPU)
    assert empty.is_empty
    total, metrics = objective.heldout_loss(model, empty, 3)
    assert total.item() == 0 and all(float(value) == 0 for value in metrics.values())
    total.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.abs().max() > 0


def test_evaluation_says_how_sure_and_how_right(score: Path, two_ranks: Ranks) -> None:
    margins: list[float] = []
    weights: list[float] = []
    right: dict[str, list[float]] = {}
    for prompt, rating in zip(prompts_of(score, batch()), RATINGS, strict=True):
        differences = [(w - v).item() for w, v in slow_ranking.pairs(prompt)]
        margins += differences
        if differences:
            weights += [1 / len(differences)] * len(differences)
            right.setdefault(rating, []).append(sum(d > 0 for d in differences) / len(differences))
    counts = slow_ranking.calibration_counts(margins, NUM_BINS, weights)
    error = sum(abs(correct - confidence) for _, confidence, correct in counts) / sum(row[0] for row in counts)
    expected = {f"accuracy_{name}": sum(parts) / len(parts) for name, parts in right.items() if name}
    assert len(expected) == 2 and error > 0.01
    for rank in (0, 1):
        found = two_ranks.run(programs.learn, score, config(), 1, [batch()])[rank][0]
        assert found["calibration_error"] == pytest.approx(error, abs=1e-5)
        assert {name: value for name, value in found.items() if name.startswith("accuracy_")} == pytest.approx(expected)
        assert not any(name.startswith("rating_") for name in found)


def test_evaluation_of_soft_labels_follows_the_probability(score: Path) -> None:
    """Whichever response a row has first: of chosen and rejected too, where the rejected one is probably better."""
    ratings = ["much", "much", "even", "slightly", "slightly"]
    rows = programs.ranked(PAIRS, preferences=PREFERENCES, ratings=ratings)
    margins = [a - b for a, b in scores_by_comparison(score, rows)]
    right = {"much": 0.0, "slightly": 0.0}
    bins: dict[int, list[float]] = {}
    for margin, p, rating in zip(margins, PREFERENCES, ratings, strict=True):
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(math.ceil((confidence - 0.5) * 20), []).append((p if margin > 0 else 1 - p) - confidence)
        if p != 0.5:
            right[rating] += 0.5 * ((margin > 0) == (p > 0.5))
    error = sum(abs(sum(gaps)) for gaps in bins.values()) / len(PREFERENCES)
    found = programs.learner(context(), score, config(loss="soft_labels")).evaluate([rows])
    assert found["calibration_error"] == pytest.approx(error, abs=1e-6)
    accuracies = {name: value for name, value in found.items() if name.startswith("accuracy_")}
    assert accuracies == pytest.approx({f"accuracy_{name}": value for name, value in right.items()})


def test_scores_that_fit_the_probabilities_are_calibrated() -> None:
    """Each in a bin of its own, sigmoid(first - second) the probability: an error of 0."""
    wanted = [0.03, 0.9, 0.2, 0.71, 0.55]
    rows = programs.ranked(PAIRS, preferences=wanted)
    objective = RewardRanking(config(loss="soft_labels"))
    pack = objective.batch([rows]).pack(range(5), CPU)
    scores_N = torch.tensor([[math.log(p / (1 - p)), 0.0] for p in wanted]).flatten()
    _, metrics = objective.heldout_loss(Given(scores_N), pack, 5)
    report = objective.evaluation({name: float(value) for name, value in metrics.items()})
    assert report["calibration_error"] == pytest.approx(0, abs=1e-6)


class Given(torch.nn.Module):
    """A model whose scores are given."""

    def __init__(self, scores_N: torch.Tensor) -> None:
        super().__init__()
        self.scores_N = scores_N

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        """The scores, whatever the tokens."""
        return self.scores_N


def test_a_rating_of_equals_alone_has_no_accuracy(score: Path) -> None:
    rows = programs.ranked([[0, 1], [0, 0]], ratings=["much", "none"])
    found = programs.learner(context(), score, config()).evaluate([rows])
    assert "accuracy_much" in found and "accuracy_none" not in found


def test_a_comparison_may_come_twice_in_a_row(score: Path) -> None:
    """As it does where a small source weighs much, and where one epoch ends and the next begins."""
    rows = programs.ranked([[0, 0, 1]], seed=1)
    twice = pa.Table.from_batches([rows, rows]).combine_chunks().to_batches()[0]
    assert Comparisons([twice]).bounds == Comparisons([rows, rows]).bounds == [0, 3, 6]
    actor = programs.learner(context(), score, config())
    once = actor.evaluate([rows])
    assert actor.evaluate([twice])["loss"] == pytest.approx(once["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "ranks", [[1, 0], [0, 2, 1], [1, 2], [0], [0, 1, 0]], ids=["backwards", "mixed", "no best", "single", "falling"]
)
def test_rows_out_of_order_are_refused(ranks: list[int]) -> None:
    with pytest.raises(SchemaError, match=r"best\) upwards, got ranks .* at row 2$"):
        Comparisons([programs.ranked([[0, 1], ranks, [0, 1]])])


def test_rows_apart_are_refused() -> None:
    rows = comparisons(2)
    with pytest.raises(SchemaError, match="two or more rows that stand together"):
        Comparisons([rows.take(pa.array([0, 2, 1, 3]))])
    with pytest.raises(SchemaError, match="two or more rows that stand together"):
        Comparisons([rows.take(pa.array([1, 0]))])
    with pytest.raises(SchemaError, match="the batch is empty"):
        Comparisons([rows.slice(0, 0)])
    with pytest.raises(SchemaError):
        Comparisons([])


def test_what_a_loss_cannot_take_is_refused() -> None:
    with pytest.raises(SchemaError, match="two responses; use `loss: ranking`"):
        RewardRanking(config(loss="soft_labels")).batch([programs.ranked([[0, 1], [0, 1, 2]])])
    for loss in ("ranking", "best_of"):
        with pytest.raises(SchemaError, match="no comparison of the batch has two responses of different rank"):
            RewardRanking(config(loss=loss)).batch([programs.ranked([[0, 0]])])


def test_a_comparison_longer_than_a_pack_is_refused(score: Path) -> None:
    actor = programs.learner(context(), score, config(), max_tokens=10)
    with pytest.raises(ValueError, match="max_tokens"):
        actor.evaluate([batch()])
