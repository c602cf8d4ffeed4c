"""Data that a learner cannot train on are refused before a row is drawn: by the check, and by the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from data.build import Counts
from data.tokenizer import load_tokenizer
from launch.check_data import check_data
from launch.config import AnyLearnerRunConfig, OnlineRunConfig
from launch.configfile import load
from launch.data_rules import require_usable
from launch.errors import ConfigError
from tests.launch.test_resume import described

ROOT = Path(__file__).parents[2]
KWISE, SOFT, DPO = "methods/reward_kwise", "methods/reward_soft_labels", "dpo"
ANSWERS = [" 1 2 3", " 1 3 2", " 2 1 3", " 3 2 1"]


def row(num_responses: int, **order: object) -> dict[str, object]:
    ranks = order or {"ranks": list(range(num_responses))}
    return {"prompt": "list 3 1 2 sorted :", "responses": ANSWERS[:num_responses], **ranks}


@pytest.fixture
def runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TROUPE_HOME", str(home))
    return home / "runs"


def of(name: str, *overrides: str) -> AnyLearnerRunConfig:
    config = load(ROOT / "examples" / f"{name}.yaml", ["data.heldout=[]", "algorithm.evaluate_every=null", *overrides])
    assert not isinstance(config, OnlineRunConfig)
    return config


def look(runs: Path, name: str, *rows: Mapping[str, object], overrides: tuple[str, ...] = ()) -> list[str]:
    """The problems of a shipped run with ``rows`` for data."""
    (runs / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = of(name, "data.train=runs/rows.jsonl", *overrides)
    return [str(problem) for problem in check_data(config, load_tokenizer(str(runs / "demo-sft" / "model")), [])]


def test_a_comparison_fits_a_pack_with_all_its_responses(runs: Path) -> None:
    """Two of ``max_tokens`` do, or the configuration would be refused; four of them may not."""
    rows = [row(2), row(4)]
    sized = ("data.max_tokens=16", "learner.max_tokens_per_pack=32")
    [problem] = look(runs, KWISE, *rows, overrides=sized)
    assert problem.startswith("learner.max_tokens_per_pack: 32 is less than data.train.0 needs, which has a comparison")
    longest = int(problem.rpartition(" ")[2])
    assert 32 < longest <= 64
    assert look(runs, KWISE, *rows, overrides=(sized[0], f"learner.max_tokens_per_pack={longest}")) == []
    assert look(runs, KWISE, row(2), overrides=sized) == []


@pytest.mark.parametrize(("name", "taker"), [(DPO, "dpo"), (SOFT, "algorithm.loss soft_labels")])
def test_what_takes_pairs_is_given_pairs(runs: Path, name: str, taker: str) -> None:
    pair = row(2, preference=0.8)
    [problem] = look(runs, name, pair, row(3))
    assert problem.startswith(f"data.train.0: has a row of 3 responses, and {taker} takes rows of two")
    assert look(runs, name, pair) == []
    assert look(runs, KWISE, pair, row(3)) == []


def test_soft_labels_learn_from_a_column_that_is_there(runs: Path) -> None:
    misspelt = row(2, ranks=[0, 1], preferences=0.8)
    [problem] = look(runs, SOFT, misspelt, misspelt)
    assert problem.startswith("data.train.0: none of its 2 rows has a `preference`, which soft_labels learns from")
    assert look(runs, SOFT, misspelt, row(2, preference=0.5)) == []
    assert look(runs, KWISE, misspelt) == []


def test_a_run_refuses_what_the_check_does_not_see() -> None:
    """The check looks at the first rows. A run knows all of them before it trains."""
    counts = Counts("a.jsonl", read=3, train=3, num_preferences=3)
    data = replace(described("f"), longest_row=64, most_responses=2, counts=(counts,))
    for name in (KWISE, SOFT, DPO, "sft"):
        require_usable(of(name, "data.max_tokens=32", "learner.max_tokens_per_pack=64"), data)
    large = replace(data, longest_row=65, most_responses=4)
    with pytest.raises(ConfigError, match="64 is less than data needs, which has a comparison of 65 tokens"):
        require_usable(of(KWISE, "learner.max_tokens_per_pack=64"), large)
    with pytest.raises(ConfigError, match="run demo-dpo: 1 problem\n  data: has a row of 4 responses, and dpo takes"):
        require_usable(of(DPO), large)
    without = replace(counts, path="b.jsonl", num_preferences=0)
    with pytest.raises(ConfigError, match=r"b\.jsonl: none of its 3 rows has a `preference`"):
        require_usable(of(SOFT), replace(data, counts=(counts, without)))
