"""A pack in padded batches: bounded padding, the pack's order, and the gradients that each sequence has alone."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.config import ModelConfig
from actors.deepspeed_engine import TrainEngine
from actors.models import PackedModel, load_causal_lm, load_scorer
from actors.padded import MOST_PADDED, run_padded, similar
from cluster.context import RankContext
from tests.actors import engine_programs, tiny_models, tuning_programs
from tests.actors.ranks import Ranks


def padded_tokens(lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[row] for row in batch) for batch in similar(lengths))


def test_one_long_sequence_does_not_pad_the_short_ones() -> None:
    """4000 and 41 times 100 tokens were 168,000 in one batch."""
    lengths = [100] * 20 + [4000] + [100] * 21
    assert similar(lengths)[0] == [20]
    assert padded_tokens(lengths) == 8100


@pytest.mark.parametrize("seed", range(20))
def test_padding_is_bounded_and_every_sequence_runs_once(seed: int) -> None:
    source = random.Random(seed)
    lengths = [int(source.lognormvariate(4, 1.5)) + 1 for _ in range(source.randint(1, 80))]
    batches = similar(lengths)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[row] for row in batch]
        assert len(own) * own[0] <= MOST_PADDED * sum(own) and own[0] == max(own)
    # Few batches: neighbours do not fit together.
    assert len(batches) <= 1 + 2 * len({length.bit_length() for length in lengths})


def test_equal_lengths_are_one_batch() -> None:
    assert similar([7, 7, 7]) == [[0, 1, 2]]
    assert similar([6, 5]) == [[0, 1]]


def test_outputs_come_back_in_the_order_of_the_pack() -> None:
    """Each token with its place and its batch's width; the padding is masked and its outputs go nowhere."""
    seen = []

    def run(tokens: Tensor, mask: Tensor) -> Tensor:
        seen.append(tuple(tokens.shape))
        assert torch.equal(mask, (tokens > 0).long())
        return torch.stack([tokens, mask.cumsum(1)], -1)

    lengths = [2, 30, 1, 28, 3]
    tokens = torch.arange(1, sum(lengths) + 1)
    positions = torch.cat([torch.arange(length) for length in lengths])
    found = run_padded(run, tokens, positions, sharded=False)
    assert torch.equal(found, torch.stack([tokens, positions + 1], -1))
    assert seen == [(3, 30), (2, 2)]


@pytest.mark.parametrize("head", ["causal", "score"])
def test_gradients_are_those_of_the_sequences_alone(head: str, tmp_path: Any) -> None:
    folder = tiny_models.write(tmp_path, "bloom", head)
    config = ModelConfig(path=str(folder), dtype="float32", attention="eager")
    model: PackedModel = load_causal_lm(config) if head == "causal" else load_scorer(config)
    source = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 64, (length,), generator=source) for length in (3, 60, 2, 50, 1, 4)]
    assert len(similar([len(row) for row in rows])) > 1
    positions = [torch.arange(len(row)) for row in rows]
    results = []
    for pairs in ([(torch.cat(rows), torch.cat(positions))], list(zip(rows, positions, strict=True))):
        model.zero_grad()
        given = [model(*pair) for pair in pairs]
        whole = torch.cat(given)
        torch.autograd.backward(whole.square().mean())
        results.append((whole, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (together, found), (alone, expected) = results
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def learn(own: RankContext, folder: Path, stage: int) -> tuple[list[float], dict[str, Tensor], list[int]]:
    """Losses of three updates, the weights afterwards, and how many batches this rank's packs are."""
    settings = tuning_programs.config(folder, stage, "full", model={"attention": "eager"})
    engine = TrainEngine(load_causal_lm(settings.model), own, settings)
    reports = tuning_programs.learn(engine, own, range(3), rows_per_pack=4)
    packs = [pack for step in range(3) for pack in engine_programs.deal(engine_programs.batch(step), own, 4)]
    counts = [len(similar([len(part) for part in _rows(positions)])) for _, positions in packs]
    return [report["loss"] for report in reports], engine_programs.weights(engine), counts


def _rows(positions: Tensor) -> list[Tensor]:
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
    return [positions[start:end] for start, end in pairwise(starts)]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_ranks_with_sharded_weights_run_equally_many_batches(tmp_path: Path, two_ranks: Ranks) -> None:
    """Else one would wait for the other for ever. And they learn what one rank alone does."""
    folder = tiny_models.write(tmp_path, "bloom")
    one, other = two_ranks.run(learn, folder, 3)
    assert one[2] != other[2], "the ranks have as many batches anyhow"
    plain = two_ranks.run(learn, folder, 1)[0]
    assert one[0] == pytest.approx(plain[0], rel=1e-5)
    for name, weight in plain[1].items():
        torch.testing.assert_close(one[1][name], weight, rtol=1e-4, atol=1e-5)
