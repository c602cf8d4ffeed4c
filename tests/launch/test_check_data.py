"""What ``troupe check`` says of the data, and of the places."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray

from data.tokenizer import Tokenizer, load_tokenizer
from launch.check import CheckReport, _check_attention, _check_places
from launch.check_data import ROWS_READ, check_data
from launch.check_models import wanted_models
from launch.configfile import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TROUPE_HOME", str(home))
    return home / "runs"


@pytest.fixture
def tokenizer(runs: Path) -> Tokenizer:
    return load_tokenizer(str(runs / "demo-sft" / "model"))


def look(name: str, tokenizer: Tokenizer | None, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """The problems with the data of a shipped run, and what was found."""
    facts: list[tuple[str, str]] = []
    problems = [str(problem) for problem in check_data(load(ROOT / name, overrides), tokenizer, facts)]
    return problems, dict(facts)


def written(runs: Path, *rows: Mapping[str, object] | str, name: str = "rows.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (runs / name).write_text("".join(f"{line}\n" for line in lines))
    return f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ray_config.yaml", {"data.train.0": ("200 rows read", "format prompt")}),
        ("examples/pretrain.yaml", {"data.train.0": ("400 rows read", "format text")}),
        ("examples/sft.yaml", {"data.train.0": ("240 rows read",), "data.heldout.0": ("20 rows read",)}),
        ("examples/reward.yaml", {"data.train.0": ("160 rows read", "chosen + rejected"), "data.heldout.0": ()}),
    ],
)
def test_what_the_shipped_runs_read(name: str, found: dict[str, tuple[str, ...]], tokenizer: Tokenizer) -> None:
    problems, facts = look(name, tokenizer)
    assert problems == []
    assert facts.keys() == found.keys()
    for where, told in found.items():
        assert all(words in facts[where] for words in told), facts[where]


def test_only_the_first_rows_are_read(runs: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "list 1 2 sorted :"}] * ROWS_READ
    problems, facts = look("ray_config.yaml", tokenizer, f"data.train={written(runs, *rows, 'broken')}")
    assert problems == []
    assert "(the first 1,000 were looked at)" in facts["data.train.0"]


@pytest.mark.parametrize("with_tokenizer", [True, False], ids=["tokenised", "read"])
def test_every_source_is_looked_at(runs: Path, tokenizer: Tokenizer, with_tokenizer: bool) -> None:
    broken = written(runs, {"prompt": "list 1"}, '{"prompt": "list', name="broken.jsonl")
    unknown = written(runs, {"question_text": "list 1"}, name="unknown.jsonl")
    sources = f"data.train=[{broken}, runs/none.jsonl, runs/demo-data/prompts.jsonl, {unknown}]"
    problems, facts = look("ray_config.yaml", tokenizer if with_tokenizer else None, sources)
    first, second, third = problems
    assert first.startswith(f"data.train.0: {runs}/broken.jsonl:2: not JSON")
    assert second.startswith(f"data.train.1: {runs}/none.jsonl: no such file")
    assert third.startswith(f"data.train.3: {runs}/unknown.jsonl:1: ")
    assert "question_text" in third
    assert ("data.train.2" in facts) is with_tokenizer


def test_nothing_left(runs: Path, tokenizer: Tokenizer) -> None:
    [problem], _ = look("ray_config.yaml", tokenizer, f"data.train={written(runs)}")
    assert problem.startswith("data.train.0: ")
    assert "nothing is left" in problem
    long = written(runs, {"prompt": "list 1 2 3 4 5 6 7 8 9 sorted :"})
    [problem], _ = look("ray_config.yaml", tokenizer, f"data.train={long}", "data.max_tokens=2")
    assert "1 too long" in problem
    assert "the longest has " in problem
    [problem], _ = look("ray_config.yaml", tokenizer, f"data.train={long}", "data.max_tokens=2", "data.too_long=refuse")
    assert f"{runs}/rows.jsonl:1: " in problem


def test_a_template_that_is_not_there_is_told_of_once(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    problems, _ = look("examples/sft.yaml", tokenizer, "data.apply_chat_template=always")
    [problem] = problems
    assert problem.startswith("data: tokenizer ")
    assert "chat template" in problem


def test_text_that_is_mixed_in_is_read(runs: Path, tokenizer: Tokenizer) -> None:
    problems, facts = look("examples/methods/ppo_ptx.yaml", tokenizer)
    assert problems == []
    assert "400 rows read" in facts["pretraining_data.train.0"] and "format text" in facts["pretraining_data.train.0"]
    broken = written(runs, '{"text": "list', name="text.jsonl")
    for with_tokenizer in (tokenizer, None):
        sources = f"pretraining_data.train=[{broken}, runs/none.txt]"
        first, second = look("examples/methods/ppo_ptx.yaml", with_tokenizer, sources)[0]
        assert first.startswith(f"pretraining_data.train.0: {runs}/text.jsonl:1: not JSON")
        assert second.startswith(f"pretraining_data.train.1: {runs}/none.txt: no such file")


CHECKED = (
    "data.keep_columns=[answer]",
    "evaluation.checkers.right={kind: checker, check: {name: exact}}",
)


@pytest.mark.parametrize("with_tokenizer", [True, False], ids=["tokenised", "read"])
def test_held_out_rows_have_what_checkers_read(runs: Path, tokenizer: Tokenizer, with_tokenizer: bool) -> None:
    known = tokenizer if with_tokenizer else None
    heldout = "data.heldout=[runs/demo-data/heldout.jsonl, {}]"
    there = written(runs, {"prompt": "list 1", "answer": None}, {"prompt": "list 2", "answer": "2"}, name="some.jsonl")
    assert look("ray_config.yaml", known, *CHECKED, heldout.format(there))[0] == []
    without = written(runs, {"prompt": "list 1"}, name="without.jsonl")
    [problem], _ = look("ray_config.yaml", known, *CHECKED, heldout.format(without))
    assert problem.startswith(f"data.heldout.1: {runs}/without.jsonl:1: no column 'answer', which data.keep_columns")
    null = written(runs, {"prompt": "list 1", "answer": None}, name="null.jsonl")
    [problem], _ = look("ray_config.yaml", known, *CHECKED, heldout.format(null))
    assert problem == (
        f"data.heldout.1: {runs}/null.jsonl: the column 'answer' is null in every row, and evaluation.checkers.right "
        "reads it; rows with it, or evaluation.checkers.right without it"
    )
    # Nothing is evaluated on rows that are trained on, unless some of them are held out.
    trained = f"data.train={null}"
    assert look("ray_config.yaml", known, *CHECKED, heldout.format(there), trained)[0] == []
    [problem], _ = look("ray_config.yaml", known, *CHECKED, trained, "data.heldout_fraction=0.5")
    assert problem.startswith("data.train.0: ") and "evaluation.checkers.right reads it" in problem
    [problem], _ = look("ray_config.yaml", known, CHECKED[0], "reward={kind: checker, check: {name: exact}}", trained)
    assert problem.startswith("data.train.0: ") and "and reward reads it" in problem


def places(name: str, *overrides: str) -> tuple[list[str], CheckReport]:
    report, config = CheckReport(), load(ROOT / name, overrides)
    problems = _check_places(config.placements(), config.cluster, config.cpus_wanted(), report)
    return [str(problem) for problem in problems], report


def test_a_run_on_this_machine_is_placed_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    problems, report = places("ray_config.yaml")
    assert problems == []
    assert not ray.is_initialized()
    assert ("policy", "1 x 2", "-", "0.5", "policy (1 bundle)", "PACK") in report.places
    assert [what for what, _ in report.facts] == ["node"]


def test_nodes_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    problems, _ = places("ray_config.yaml", "policy.num_nodes=2", "policy.strategy=STRICT_SPREAD")
    assert problems == [
        "cluster: policy bundle 1 of 2 needs 1 CPU: node this machine is ruled out by STRICT_SPREAD (in the whole "
        "cluster)"
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_flash_attention_needs_its_package(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the roles run. A cluster's nodes may have it where the machine that checks has not: there it is told."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = ModuleSpec("flash_attn", None) if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "flash_attn" else find_spec(name))
    words = (
        "policy.model={path: runs/demo-sft/model, attention: flash_attention_2, dtype: bfloat16}",
        "policy.gpus_per_rank=1",
    )
    for address, told in (("", "problem"), ("10.0.0.1:6379", "fact")):
        config = load(ROOT / "ray_config.yaml", [*words, *([f"cluster.address={address}"] if address else [])])
        report = CheckReport()
        problems = [str(problem) for problem in _check_attention(wanted_models(config), config.cluster, report)]
        facts = [f"{where}: {fact}" for where, fact in report.facts]
        said = {"problem": problems, "fact": facts}[told]
        assert problems + facts == said
        if installed:
            assert not said
        else:
            [line] = said
            assert line.startswith("policy.model.attention: ") and "the package flash-attn" in line
            assert "pip install flash-attn --no-build-isolation" in line and "attention: sdpa" in line


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:{port}", "no Ray cluster at {address}"),
        ("127.0.0.1:99999999", "no Ray cluster at {address}"),
        ("ray://localhost:{port}", "{address} (from RAY_ADDRESS or cluster.address) is not a cluster's own address"),
    ],
)
def test_a_cluster_that_does_not_answer_is_not_waited_for(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:  # bound, and nothing listens
        unused.bind(("127.0.0.1", 0))
        address = address.format(port=unused.getsockname()[1])
        [problem], report = places("ray_config.yaml", f"cluster.address={address}")
        assert problem.startswith("cluster.address: " + reason.format(address=address))
        assert len(report.places) == 7
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert places("ray_config.yaml")[0] == [problem]
