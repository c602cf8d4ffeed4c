"""A home folder with small data and small random models under the names that the shipped configurations use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from examples.demo_data import Sizes, write_base_model, write_data

ROOT = Path(__file__).parent.parent
SIZES = Sizes(pretrain=400, sft=240, preferences=160, prompts=200, heldout=20)

#: Files of tests that take long: first, so that no worker is left with one of them at the end.
LONG = (
    "test_runs.py",
    "test_learner_runs.py",
    "test_tuned_runs.py",
    "test_job_submit.py",
    "test_tuning.py",
    "test_tuned_policy.py",
    "test_group.py",
    "test_placement.py",
)

Troupe = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, each whole and in its own order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs/demo-data``, and random models in the places of ``runs/demo-sft`` and ``runs/demo-reward``."""
    home = tmp_path_factory.mktemp("home")
    data = home / "runs" / "demo-data"
    write_data(data, seed=0, sizes=SIZES)
    write_base_model(data / "base")
    # In a process of its own: transformers would otherwise be loaded into the tests of what must not load it.
    program = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
home = Path(sys.argv[1])
base = home / "runs" / "demo-data" / "base"
torch.manual_seed(0)
for name, kind, labels in (
    ("demo-sft", AutoModelForCausalLM, {}), ("demo-reward", AutoModelForSequenceClassification, {"num_labels": 1})
):
    model = kind.from_config(AutoConfig.from_pretrained(base, **labels))
    model.save_pretrained(home / "runs" / name / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(home / "runs" / name / "model")
"""
    subprocess.run([sys.executable, "-c", program, str(home)], check=True, capture_output=True)
    return home


@pytest.fixture
def home(models: Path, tmp_path: Path) -> Path:
    """A fresh home that sees the data and the models."""
    (tmp_path / "runs").mkdir()
    for folder in (models / "runs").iterdir():
        (tmp_path / "runs" / folder.name).symlink_to(folder)
    return tmp_path


@pytest.fixture
def troupe(home: Path) -> Troupe:
    """``troupe ...`` as a user types it, with the home in ``$TROUPE_HOME``."""

    def run(*words: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launch", *words],
            cwd=ROOT,
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


def environment(home: Path) -> Mapping[str, str]:
    """The environment that ``troupe`` is run in."""
    return {**os.environ, "TROUPE_HOME": str(home), "COLUMNS": "200"}
