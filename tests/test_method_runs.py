"""Every example of a method, carried out for two updates, as a user starts it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.running import ROOT, Troupe, check_done, rows

ONLINE = ("online.batch_size=32", "online.scoring_batch_size=16")
EXAMPLES = sorted(path for path in (ROOT / "examples" / "methods").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, troupe: Troupe, home: Path) -> None:
    text = path.read_text()
    cut = ONLINE if "\nonline:" in text else ("algorithm.evaluate_every=null",)
    if "critic_warmup_iterations" in text:
        cut = (*cut, "algorithm.critic_warmup_iterations=1")  # of two
    (home / "runs" / "demo-pretrain").symlink_to(home / "runs" / "demo-sft")
    check_done(troupe("train", str(path), "run.name=cut", "run.num_iterations=2", *cut, timeout_s=500))
    steps = [row for row in rows(home / "runs" / "cut") if "time/total_s" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert (home / "runs" / "cut" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_algorithm_of_the_docs_runs(
    troupe: Troupe, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is on PYTHONPATH, where the process of every role finds it."""
    page = (ROOT / "docs" / "algorithms.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    ((path, word),) = re.findall(r"^PYTHONPATH=\. troupe train (\S+) (\S+)$", page, flags=re.MULTILINE)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "optimists.py").write_text(block)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    check_done(troupe("train", str(ROOT / path), word, "run.name=own", "run.num_iterations=2", *ONLINE))
    steps = [row for row in rows(home / "runs" / "own") if "experience/score" in row]
    assert [row["step"] for row in steps] == [1, 2]
    # Of a group, the winnings are twice the losses.
    assert all(row["experience/advantage"] > 0 and row["policy/ref_kl"] >= 0 for row in steps)
