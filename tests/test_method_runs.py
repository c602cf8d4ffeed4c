"""Every example of a method, carried out for two updates, as a user starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.running import ROOT, Troupe, check_done, rows

EXAMPLES = sorted(path for path in (ROOT / "examples" / "methods").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, troupe: Troupe, home: Path) -> None:
    online = "\nonline:" in path.read_text()
    cut = ("online.batch_size=32", "online.scoring_batch_size=16") if online else ("algorithm.evaluate_every=null",)
    check_done(troupe("train", str(path), "run.name=cut", "run.num_iterations=2", *cut, timeout_s=500))
    steps = [row for row in rows(home / "runs" / "cut") if "time/total_s" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert (home / "runs" / "cut" / "model" / "model.safetensors").exists()
