"""The algorithm of docs/algorithms.md, on its way through a run: configuration, rules, driver, roles."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.config import OnlineRunConfig
from launch.configfile import load
from launch.errors import ConfigError
from tests.launch.test_online_driver import ROOT, Run, nothing_travels

__all__ = ["nothing_travels"]

PAGE = (ROOT / "docs" / "algorithms.md").read_text()
#: A role's process is given the configuration, and finds the module by itself.
ROLE = """
import pickle, sys
from pathlib import Path
from actors.config import SamplingConfig
from actors.policy_loss import PolicyObjective
from actors.credit import CreditActor
from cluster.context import RankContext

algorithm = pickle.loads(Path(sys.argv[1]).read_bytes())
assert "optimists" not in sys.modules
context = RankContext("credit", 0, 1, 0, "127.0.0.1", 0, "cpu", 1, None, 0)
credit = CreditActor(context, algorithm, 16)
objective = PolicyObjective(algorithm, SamplingConfig(max_response_tokens=16))
print(credit._algorithm.credit.__name__, objective._algorithm_loss.__name__)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the page's module lies, as it says: on the path."""
    folder = tmp_path / "own"
    folder.mkdir()
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (folder / "optimists.py").write_text(block)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("optimists", None)


def command() -> tuple[Path, str]:
    """The configuration and the change to it that the page starts a run with."""
    ((path, word),) = re.findall(r"^PYTHONPATH=\. troupe train (\S+) (\S+)$", PAGE, flags=re.MULTILINE)
    return ROOT / path, word


def test_the_configuration_of_the_page_is_right_and_is_checked_against_needs(folder: Path) -> None:
    path, word = command()
    config = load(path, [word])
    assert isinstance(config, OnlineRunConfig)
    assert config.algorithm.normalise == "constant" and config.algorithm.kl.coefficient == 0.01
    assert "critic" not in config.placements() and "reference" in config.placements()
    for change, where in (
        ("reference=null", "reference"),
        ("rollout.sampling.samples_per_prompt=1", "rollout.sampling.samples_per_prompt"),
    ):
        with pytest.raises(ConfigError) as refused:
            load(path, [word, change])
        assert [problem.where.partition(" ")[0] for problem in refused.value.problems] == [where]
    for other in ("algorithm.kl.coefficient=0", "policy.tuning.method=lora"):
        load(path, [word, "reference=null", other])


async def test_a_run_assigns_its_credit(folder: Path, tmp_path: Path) -> None:
    """Two samples to a prompt, with the scores 0 and 1: 1 for the one that beats the other, and half of -1 for that."""
    run = Run(tmp_path / "run", "optimists:OPTIMISTS", lambda prompt: prompt == 1)
    await run.drive()
    assert len(run.policy.advantages) == 3
    for prompts, advantages in zip(run.policy.prompts, run.policy.advantages, strict=True):
        assert advantages == [number for prompt in prompts for number in ([0, 0] if prompt == 1 else [-0.5, 1])]


def test_roles_import_it_in_their_own_processes(folder: Path, tmp_path: Path) -> None:
    path, word = command()
    config = load(path, [word])
    assert isinstance(config, OnlineRunConfig)
    (tmp_path / "algorithm").write_bytes(pickle.dumps(config.algorithm))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    words = [sys.executable, "-c", ROLE, str(tmp_path / "algorithm")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["ranks", "surprise"], done.stderr
