"""The demo: four `troupe train` calls, and a report of what each of them taught the model.

    python -m examples.demo [--seed 0] [--home DIR]

Everything is written below the home folder (``$TROUPE_HOME``, or else the current folder): the data to
``runs/demo-data``, the runs to ``runs/demo-pretrain``, ``runs/demo-sft``, ``runs/demo-reward`` and ``runs/demo-ppo``.
The runs of an earlier demo are removed first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from examples.demo_data import write_base_model, write_data
from examples.demo_report import print_report, print_stage

EXAMPLES = Path(__file__).parent
STAGES = ("pretrain", "sft", "reward", "ppo")


def main() -> None:
    """Run all stages, one after the other."""
    parser = argparse.ArgumentParser(description="Pre-train, fine-tune, train a reward model, and run PPO against it.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of every stage")
    parser.add_argument("--home", type=Path, default=None, help="folder to work in; default $TROUPE_HOME or this one")
    arguments = parser.parse_args()
    home = (arguments.home or Path(os.environ.get("TROUPE_HOME") or ".")).absolute()
    console = Console(highlight=False)
    runs = home / "runs"
    for name in ("data", *STAGES):
        shutil.rmtree(runs / f"demo-{name}", ignore_errors=True)
    console.rule("The data")
    write_data(runs / "demo-data", arguments.seed)
    write_base_model(runs / "demo-data" / "base")
    console.print(
        "Lists of numbers are to be sorted by size. Half of the demonstrations sort them as text instead, and some "
        "slip; preferences say which of two answers is better; a program knows the right one."
    )
    began = time.monotonic()
    for stage in STAGES:
        console.rule(f"troupe train examples/{stage}.yaml")
        train(stage, arguments.seed, home)
        print_stage(console, stage, runs)
    print_report(console, runs, arguments.seed, time.monotonic() - began)


def train(stage: str, seed: int, home: Path) -> None:
    """One `troupe train`, as typed by hand."""
    command = [sys.executable, "-m", "launch", "train", str(EXAMPLES / f"{stage}.yaml"), f"run.seed={seed}"]
    finished = subprocess.run(command, env={**os.environ, "TROUPE_HOME": str(home)}, check=False)
    if finished.returncode:
        raise SystemExit(f"stage {stage} ended with exit code {finished.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    main()
