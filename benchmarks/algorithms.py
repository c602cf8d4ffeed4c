"""Every online algorithm on one small task with a checkable answer, from the same SFT model and with the same budget.

The task, SFT model and reward model are the demo's. Each algorithm is an example of this project with 30 batches of 256
samples, run as a user runs it, on several seeds. What it reached is measured on held-out prompts: one answer each,
judged by the program that knows, and its KL to the model that the run began from. A run that ends with fewer right
answers than that model is marked, and so are PPO and GRPO where they rise by less than 20 points.

The last two ways are an experiment of their own: a checker as reward, 1 for the right answer and 0 for any other, from
the SFT model and from the base model, whose answers are all wrong.

    python -m benchmarks.algorithms [--seeds 0 1 2] [--only ppo grpo] [--home DIR]

With ``--home`` runs that are finished there are not run again. 20 ways on three seeds take more than an hour on two
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import descendants, print_setting, process_cpu_s
from examples.demo_data import write_base_model, write_data
from examples.demo_report import accuracy_of, answers, first_and_last, read_rows
from examples.sorting import LONGEST_COMPLETION

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
    # Prompts that are drawn again are samples beyond the 30 batches of the others.
    "dapo": (
        "methods/grpo.yaml",
        "algorithm.normalise=tokens",
        "algorithm.kl.coefficient=0",
        "reference=null",
        "algorithm.clip_low=0.2",
        "algorithm.clip_high=0.28",
        "online.max_redraws=3",
        "total.shaping={long: {kind: overlong, margin_tokens: 2}}",
    ),
    "dr_grpo": ("methods/dr_grpo.yaml",),
    "rloo": ("methods/rloo.yaml",),
    "reinforce++": ("methods/reinforce_plus_plus.yaml",),
    "reinforce++ baseline": ("methods/grpo.yaml", "algorithm.name=reinforce_plus_plus_baseline"),
    "remax": ("methods/reinforce_plus_plus.yaml", "algorithm.name=remax"),
    "initial baseline": ("methods/initial_baseline.yaml",),
    "ppo, one version stale": ("ppo.yaml", "online.max_staleness=1"),
    **{
        f"ppo, one version stale, {method}": (
            "ppo.yaml",
            "online.max_staleness=1",
            f"algorithm.correction.method={method}",
            *bounds,
        )
        for method, bounds in {
            "truncated": (),
            "masked": (),
            # The defaults are for responses of thousands of tokens; of a stale one of six they leave hardly any.
            "sequence_masked": ("algorithm.correction.low=0.9", "algorithm.correction.high=1.1"),
            "decoupled": (),
        }.items()
    },
    "checked, from SFT": ("rewards/checker.yaml",),
    "checked, from the base model": ("rewards/checker.yaml", "policy.model.path=runs/demo-pretrain/model"),
}
#: The runs whose models the ways begin from, where that is not the SFT model.
STARTS = {"checked, from the base model": "demo-pretrain"}


#: What PPO and GRPO are to gain at least, on each seed.
RISE_POINTS = {"ppo": 20, "grpo": 20}
POLL_S = 2.0


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    ``accuracy`` and ``kl`` (nats an answer) on held-out prompts, ``score`` of its last batch, ``cpu_s`` of all its
    processes.
    """

    accuracy: float
    score: float
    kl: float
    cpu_s: float


def troupe(home: Path, yaml: str, log: Path, *words: str) -> float:
    """Run `troupe train`; returns the processor time of all its processes, in seconds, but for their last moments."""
    command = [sys.executable, "-m", "launch", "train", str(ROOT / "examples" / yaml), *words]
    taken: dict[int, float] = {}
    with log.open("w") as out:
        run = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TROUPE_HOME": str(home)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        while run.poll() is None:
            for pid in (run.pid, *descendants(run.pid)):
                with suppress(FileNotFoundError, ProcessLookupError):  # it ended in between
                    taken[pid] = process_cpu_s(pid)
            time.sleep(POLL_S)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return sum(taken.values())


def prepare(home: Path) -> None:
    """The demo's data, SFT model and reward model."""
    if (home / "runs" / "demo-reward" / "model").exists():
        return
    data = home / "runs" / "demo-data"
    write_data(data, 0)
    write_base_model(data / "base")
    for stage in STAGES:
        troupe(home, f"{stage}.yaml", home / f"{stage}.log")


@torch.inference_mode()
def kl_of(folder: Path, start: Path, prompts: list[str], seed: int) -> float:
    """Mean over sampled answers of log p(answer) - log p_start(answer), EOS included: KL to the start, in nats."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy, initial = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (folder, start)
    )
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    num_prompt = batch["input_ids"].shape[1]
    whole = policy.generate(**batch, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=LONGEST_COMPLETION + 2)
    response = whole[:, num_prompt:]
    is_eos = response == tokenizer.eos_token_id
    counts = is_eos.cumsum(1) - is_eos.long() == 0  # up to the first EOS, which counts
    mask = torch.cat([batch["attention_mask"], counts.long()], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logprobs = []
    for model in (policy, initial):
        logits = model(whole, attention_mask=mask, position_ids=positions).logits[:, num_prompt - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(-1, response[..., None])[..., 0])
    return float(((logprobs[0] - logprobs[1]) * counts).sum(1).mean())


def run(home: Path, way: str, seed: int, prompts: list[str]) -> Outcome:
    """Carry out one run, or read what an earlier one came to."""
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{way}-{seed}")
    folder, noted = home / "runs" / name, home / f"{name}.json"
    if not noted.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
        yaml, *changes = WAYS[way]
        words = [f"run.name={name}", f"run.seed={seed}", *changes]
        cpu_s = troupe(home, yaml, home / f"{name}.log", *words)
        outcome = Outcome(
            accuracy=accuracy_of(prompts, answers(folder / "model", prompts, seed)),
            score=first_and_last(read_rows(folder / "metrics.jsonl"), "experience/score")[1],
            kl=kl_of(folder / "model", home / "runs" / start_of(way) / "model", prompts, seed),
            cpu_s=cpu_s,
        )
        noted.write_text(json.dumps(asdict(outcome)))
    return Outcome(**json.loads(noted.read_text()))


def start_of(way: str) -> str:
    """The run whose model a way begins from."""
    return STARTS.get(way, "demo-sft")


def report(way: str, outcomes: list[Outcome], before: float) -> None:
    """Print one line: mean over seeds and, where there are several, least and most; and what is not as it is to be."""
    right = [100 * outcome.accuracy for outcome in outcomes]
    columns = (
        spread_of(right, 1),
        spread_of([outcome.score for outcome in outcomes], 2),
        spread_of([outcome.kl for outcome in outcomes], 2),
        spread_of([outcome.cpu_s for outcome in outcomes], 0),
    )
    rise, least = min(right) - 100 * before, RISE_POINTS.get(way, 0)
    fault = f"  rose by less than {least} points" if rise < least else ""
    print(f"| {way} | {100 * before:.1f} | {' | '.join(columns)} |{fault}", flush=True)


def spread_of(values: list[float], num_digits: int) -> str:
    """``mean (least to most)``."""
    mean, least, most = (f"{value:.{num_digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})" if len(values) > 1 else mean


def compare(home: Path, seeds: list[int], ways: list[str]) -> None:
    """All ways on all seeds."""
    home.mkdir(parents=True, exist_ok=True)
    prepare(home)
    prompts = [str(row["prompt"]) for row in read_rows(home / "runs" / "demo-data" / "heldout.jsonl")]
    before = {
        start: accuracy_of(prompts, answers(home / "runs" / start / "model", prompts, 0))
        for start in {start_of(way) for way in ways}
    }
    print(f"{len(prompts)} held-out prompts\n")
    print("| algorithm | right before, % | after | score | KL, nats | CPU s |")
    print("|---|---|---|---|---|---|", flush=True)
    for way in ways:
        report(way, [run(home, way, seed, prompts) for seed in seeds], before[start_of(way)])


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
