"""SFT and DPO against TRL's trainers: the same weights, the same rows, the same tokens in every update.

TRL runs in an environment of its own, this project as a user runs it: `troupe train`, with Ray, the source and the
learner as processes. Both train two epochs; the second is timed, from its first update to the end of its last, and its
tokens (prompts included, padding not) are divided by that time. Runs alternate.

    python3.11 -m venv /tmp/trl
    /tmp/trl/bin/python -m pip install torch==2.13.0+cpu trl==1.16.0
    python -m benchmarks.against_trl --trl-python /tmp/trl/bin/python [--size small] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.measure import print_setting
from benchmarks.tiny import sequences, write_model

ROOT = Path(__file__).parent.parent
ROWS, BATCH, PROMPT, SHORTEST, LONGEST = 192, 32, 16, 32, 224
#: Ways in which TRL is run: its defaults, and without recomputing activations, in micro-batches of several sizes.
TRL_WAYS: dict[str, dict[str, list[str]]] = {
    "sft": {
        "TRL as it comes (checkpointing, 8 rows)": ["--micro-batch=8", "--checkpointing"],
        "TRL, 8 rows at a time": ["--micro-batch=8"],
        "TRL, 32 rows at a time": ["--micro-batch=32"],
    },
    "dpo": {
        "TRL as it comes (checkpointing, reference each step)": [
            "--micro-batch=8", "--checkpointing", "--reference-each-step",
        ],
        "TRL, reference computed before, 8 pairs at a time": ["--micro-batch=8"],
        "TRL, reference computed before, 4 pairs at a time": ["--micro-batch=4"],
    },
}


def write_rows(file: Path, method: str, size: str) -> int:
    """Random words as JSON lines; returns their tokens, one EOS a response included."""
    prompts = sequences(ROWS, PROMPT, PROMPT, size, seed=1)
    responses = [sequences(ROWS, SHORTEST - PROMPT, LONGEST - PROMPT, size, seed) for seed in (2, 3)]
    keys = ["completion"] if method == "sft" else ["chosen", "rejected"]
    num_tokens = 0
    with file.open("w") as out:
        for row, prompt in enumerate(prompts):
            given = {key: _words(responses[at][row], " ") for at, key in enumerate(keys)}
            out.write(json.dumps({"prompt": _words(prompt, ""), **given}) + "\n")
            num_tokens += sum(len(prompt) + len(responses[at][row]) + 1 for at in range(len(keys)))
    return num_tokens


def _words(tokens: list[int], before: str) -> str:
    return before + " ".join(f"w{token}" for token in tokens)


def run_troupe(home: Path, method: str, name: str, threads: int) -> float:
    """Seconds of the second epoch."""
    updates = 2 * ROWS // BATCH
    config = f"""
run: {{name: {name}, log_every: 1000}}
algorithm: {{name: {method}, num_epochs: 2, batch_size: {BATCH}}}
data: {{train: {home}/{method}.jsonl, max_tokens: 512}}
learner:
  model: {{path: {home}/model, dtype: float32}}
  threads_per_rank: {threads}
  cpus_per_rank: {threads}
  zero: {{stage: 0}}
  max_tokens_per_pack: 1024
  optimizer: {{learning_rate: 1.0e-4}}
"""
    file = home / f"{name}.yaml"
    file.write_text(config)
    environment = {**os.environ, "TROUPE_HOME": str(home)}
    command = [sys.executable, "-m", "launch", "train", str(file)]
    _checked(command, environment)
    steps = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [step["time/total_s"] for step in steps if "time/total_s" in step]
    if len(seconds) != updates:
        raise SystemExit(f"{name}: {len(seconds)} updates where {updates} were due")
    return float(sum(seconds[updates // 2 :]))


def run_trl(python: Path, home: Path, method: str, name: str, words: list[str], threads: int) -> float:
    """Seconds of the second epoch."""
    command = [
        *(str(python), str(ROOT / "benchmarks" / "trl_side.py"), method, str(home / "model")),
        *(str(home / f"{method}.jsonl"), str(home / name), f"--batch-size={BATCH}", f"--threads={threads}", *words),
    ]
    report = json.loads(_checked(command, {**os.environ, "OMP_NUM_THREADS": str(threads)}).splitlines()[-1])
    return float(report["seconds"])


def _checked(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def race(python: Path, home: Path, method: str, size: str, rounds: int, threads: int) -> None:
    """Time one method both ways and print what came of it."""
    num_tokens = write_rows(home / f"{method}.jsonl", method, size)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        seconds["troupe"].append(run_troupe(home, method, f"{method}-{number}", threads))
        for at, (way, words) in enumerate(TRL_WAYS[method].items()):
            seconds[way].append(run_trl(python, home, method, f"trl-{method}-{number}-{at}", words, threads))
        print(f"{method}, round {number + 1}:", *(f"{taken[-1]:.1f} s" for taken in seconds.values()), flush=True)
    print(f"\n{method}: {num_tokens} tokens in {ROWS // BATCH} updates")
    print(f"{'':56} {'seconds':>8} {'tokens/s':>9} {'troupe is faster by':>20}")
    for way, taken in seconds.items():
        median = statistics.median(taken)
        ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds["troupe"], taken, strict=True))
        print(f"{way:56} {median:8.2f} {num_tokens / median:9,.0f} {ratio:20.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="the Python of TRL's environment")
    parser.add_argument("--size", default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(TRL_WAYS), default=list(TRL_WAYS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "runs").mkdir()
        num_weights = write_model(home / "model", given.size)
        print_setting(
            "learning from data against TRL's trainers",
            {
                "model": f"{num_weights / 1e6:.1f} M weights, float32, one rank of {given.threads} threads",
                "rows": f"{ROWS} rows an epoch, responses of {SHORTEST} to {LONGEST} tokens with their prompts",
                "update": f"{BATCH} rows",
            },
        )
        for method in given.methods:
            race(given.trl_python, home, method, given.size, given.rounds, given.threads)


if __name__ == "__main__":
    main()
