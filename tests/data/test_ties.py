"""Comparisons of which no response is better: left out and counted, but where how surely is learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import DataConfig
from data.dataset import Dataset
from data.errors import EmptyDataError, RowError
from data.formats import recognise
from data.order import Cursor
from data.records import Comparison
from tests.data.decoding import DecodingTokenizer

TWO = {"prompt": "the", "responses": [" cat", " dog"]}
THREE = {"prompt": "the", "responses": [" cat", " dog", " log"]}


def parsed(row: dict[str, object]) -> Comparison:
    record = recognise(frozenset(row), "comparisons").parse(row)
    assert isinstance(record, Comparison)
    return record


@pytest.mark.parametrize(
    ("order", "first", "ranks", "preference"),
    [
        ({"preference": 0.9}, "cat", (0, 1), 0.9),
        ({"preference": 0.3}, "dog", (0, 1), 0.7),
        ({"preference": 0.5}, "cat", (0, 0), 0.5),
        ({"scores": [1.0, 1.0]}, "cat", (0, 0), None),
        ({"ranks": [2, 1]}, "dog", (0, 1), None),
        ({"ranks": [2, 1], "preference": 0.25}, "dog", (0, 1), 0.75),
        ({"ranks": [1, 1], "preference": 0.5}, "cat", (0, 0), 0.5),
    ],
)
def test_equal_keys_are_ties(
    order: dict[str, object], first: str, ranks: tuple[int, ...], preference: float | None
) -> None:
    record = parsed(TWO | order)
    assert record.responses[0][0].content.strip() == first
    assert record.ranks == ranks
    assert record.is_tied == (ranks == (0, 0))
    assert record.preference == pytest.approx(preference)


def make(
    tokenizer: DecodingTokenizer, path: str, *, keep_ties: bool = False, cache_dir: str | None = None
) -> Dataset:
    config = DataConfig(train=path, max_tokens=16, cache_dir=cache_dir)
    return Dataset.from_config(config, "comparisons", tokenizer, seed=0, keep_ties=keep_ties)


def test_ties_are_left_out_and_counted(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    """Under ``bad_rows: refuse``, which stays for rows that are broken."""
    tied = [TWO | {"preference": 0.5}, TWO | {"scores": [2, 2]}, THREE | {"ranks": [1, 1, 1]}]
    good = [TWO | {"preference": 0.8}, THREE | {"ranks": [1, 2, 2]}]
    data = make(plain, jsonl(*tied, *good))
    (counts,) = data.counts
    assert (counts.read, counts.tied, counts.bad, counts.train, counts.num_preferences) == (5, 3, 0, 2, 1)
    assert ", 0 bad, 3 tied, 0 too long, 2 kept" in str(counts)
    assert sorted(data.draw(Cursor(), 2).batch["rank"].to_pylist()) == [0, 0, 1, 1, 1]
    assert data.train_facts.most_rows == 3
    broken = jsonl(*tied, THREE | {"ranks": [1, 1]}, name="broken.jsonl")
    with pytest.raises(RowError, match=rf"{broken}:4: ranks must be a list of 3 numbers"):
        make(plain, broken)
    with pytest.raises(EmptyDataError, match=r"3 rows read, 0 bad, 3 tied, 0 too long, 0 kept .*nothing is left"):
        make(plain, jsonl(*tied, name="tied.jsonl"))


def test_a_stated_tie_is_kept_where_it_is_learnt_from(
    plain: DecodingTokenizer, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = jsonl(TWO | {"preference": 0.5}, TWO | {"scores": [2, 2]}, TWO | {"preference": 0.25})
    for cache_dir in (None, str(tmp_path / "cache")):
        data = make(plain, path, keep_ties=True, cache_dir=cache_dir)
        (counts,) = data.counts
        assert (counts.tied, counts.train, counts.num_preferences) == (1, 2, 2)
        batch = data.in_order().batch
        assert batch["rank"].to_pylist() == [0, 0, 0, 1]
        assert batch["preference"].to_pylist() == [0.5, 0.5, 0.75, 0.75]
        assert make(plain, path, cache_dir=cache_dir).num_rows == 1, "of the same cache, without ties"
