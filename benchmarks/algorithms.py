"""Every online algorithm on one small task with a checkable answer, from the same SFT model and with the same budget.

The task, SFT model and reward model are the demo's. Each algorithm is an example of this project with 30 batches of 256
samples, run as a user runs it, on several seeds; what it reached is measured on held-out prompts by the program that
knows the answers. A run that ends with fewer right answers than the model it began from is marked as collapsed.

The last two ways are an experiment of their own: a checker as reward, 1 for the right answer and 0 for any other, from
the SFT model and from the base model, whose answers are all wrong.

    python -m benchmarks.algorithms [--seeds 0 1 2] [--only ppo grpo] [--home DIR]

With ``--home`` runs that are finished there are not run again. 17 ways on three seeds take about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import print_setting
from examples.demo_data import write_base_model, write_data
from examples.demo_report import accuracy_of, answers, first_and_last, read_rows

ROOT = Path(__file__).parent.parent
STAGES = ("pretrain", "sft", "reward")
#: An example, and what is changed in it.
WAYS: dict[str, tuple[str, ...]] = {
    "ppo": ("ppo.yaml",),
    "ppo, dual clip": ("ppo.yaml", "algorithm.policy_loss=dual_clip"),
    "ppo-ptx": ("methods/ppo_ptx.yaml",),
    "grpo": ("methods/grpo.yaml",),
    "grpo, gspo's loss": ("methods/grpo.yaml", "algorithm.policy_loss=gspo", "algorithm.clip_ratio=0.05"),
    "grpo, cispo's loss": ("methods/grpo.yaml", "algorithm.policy_loss=cispo", "algorithm.clip_high=4"),
    "dapo": (
        "methods/grpo.yaml",
        "algorithm.normalise=tokens",
        "algorithm.kl.coefficient=0",
        "reference=null",
        "algorithm.clip_low=0.2",
        "algorithm.clip_high=0.28",
        "online.max_redraws=3",
    ),
    "dr_grpo": ("methods/dr_grpo.yaml",),
    "rloo": ("methods/rloo.yaml",),
    "reinforce++": ("methods/reinforce_plus_plus.yaml",),
    "reinforce++ baseline": ("methods/grpo.yaml", "algorithm.name=reinforce_plus_plus_baseline"),
    "remax": ("methods/reinforce_plus_plus.yaml", "algorithm.name=remax"),
    "initial baseline": ("methods/initial_baseline.yaml",),
    "ppo, one version stale": ("ppo.yaml", "online.max_staleness=1"),
    "ppo, one version stale, decoupled": (
        "ppo.yaml", "online.max_staleness=1", "algorithm.correction.method=decoupled", "algorithm.correction.cap=5",
    ),
    "checked, from SFT": ("rewards/checker.yaml",),
    "checked, from the base model": ("rewards/checker.yaml", "policy.model.path=runs/demo-pretrain/model"),
}
#: The runs whose models the ways begin from, where that is not the SFT model.
STARTS = {"checked, from the base model": "demo-pretrain"}


@dataclass(frozen=True)
class Outcome:
    """What a run came to; ``accuracy`` on held-out prompts, ``kl`` in nats a sample, ``seconds`` of the whole run."""

    accuracy: float
    score: float
    kl: float | None
    seconds: float


def troupe(home: Path, yaml: str, log: Path, *words: str) -> float:
    """Seconds that `troupe train` took."""
    command = [sys.executable, "-m", "launch", "train", str(ROOT / "examples" / yaml), *words]
    began = time.perf_counter()
    with log.open("w") as out:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "TROUPE_HOME": str(home)},
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - began


def prepare(home: Path) -> None:
    """The demo's data, SFT model and reward model."""
    if (home / "runs" / "demo-reward" / "model").exists():
        return
    data = home / "runs" / "demo-data"
    write_data(data, 0)
    write_base_model(data / "base")
    for stage in STAGES:
        troupe(home, f"{stage}.yaml", home / f"{stage}.log")


def run(home: Path, way: str, seed: int, prompts: list[str]) -> Outcome:
    """Carry out one run, or read what an earlier one came to."""
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{way}-{seed}")
    folder, noted = home / "runs" / name, home / f"{name}.json"
    if not noted.exists():
        yaml, *changes = WAYS[way]
        words = [f"run.name={name}", f"run.seed={seed}", *changes]
        seconds = troupe(home, yaml, home / f"{name}.log", *words)
        rows = read_rows(folder / "metrics.jsonl")
        has_kl = any("experience/kl_per_sample" in row for row in rows)
        outcome = {
            "accuracy": accuracy_of(prompts, answers(folder / "model", prompts, seed)),
            "score": first_and_last(rows, "experience/score")[1],
            "kl": first_and_last(rows, "experience/kl_per_sample")[1] if has_kl else None,
            "seconds": seconds,
        }
        noted.write_text(json.dumps(outcome))
    return Outcome(**json.loads(noted.read_text()))


def report(way: str, outcomes: list[Outcome], before: float) -> None:
    """Print one line: accuracy before, mean and spread after; means of the rest."""
    right = [100 * outcome.accuracy for outcome in outcomes]
    kls = [outcome.kl for outcome in outcomes if outcome.kl is not None]
    kl = f"{statistics.mean(kls):.2f}" if kls else "-"
    spread = f"{min(right):.1f} to {max(right):.1f}"
    collapsed = "  collapsed" if min(right) < 100 * before else ""
    score, seconds = (statistics.mean(values) for values in zip(*((o.score, o.seconds) for o in outcomes), strict=True))
    print(
        f"| {way} | {100 * before:.1f} | {statistics.mean(right):.1f} | {spread} | {score:.2f} | {kl} | {seconds:.0f} |"
        f"{collapsed}",
        flush=True,
    )


def compare(home: Path, seeds: list[int], ways: list[str]) -> None:
    """All ways on all seeds."""
    home.mkdir(parents=True, exist_ok=True)
    prepare(home)
    prompts = [str(row["prompt"]) for row in read_rows(home / "runs" / "demo-data" / "heldout.jsonl")]
    before = {
        start: accuracy_of(prompts, answers(home / "runs" / start / "model", prompts, 0))
        for start in {"demo-sft", *STARTS.values()}
    }
    print(f"{len(prompts)} held-out prompts\n")
    print("| algorithm | right before, % | after | least to most | score | KL, nats | run, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for way in ways:
        report(way, [run(home, way, seed, prompts) for seed in seeds], before[STARTS.get(way, "demo-sft")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--home", type=Path, help="keep data and runs here; default a folder that is removed")
    given = parser.parse_args()
    print_setting("online algorithms on the demo's task", {"budget": "30 batches of 256 samples", "seeds": given.seeds})
    if given.home is not None:
        compare(given.home.absolute(), given.seeds, given.only)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), given.seeds, given.only)


if __name__ == "__main__":
    main()
