"""What the driver costs a PPO run: its share of the time, and its memory against the rows in flight.

Runs the demo's PPO (`examples/ppo.yaml`, random weights) as a user starts it and watches its processes from outside,
from the end of the first iteration to the end of the last:

- the driver's processor time (all of its threads, Ray's among them) as a share of the wall time, and of the processor
  time of driver, roles and engines together: the second does not depend on what else the machine does;
- the share of moments in which no thread of any role or engine runs or could run; for these, whether the driver or
  one of Ray's own processes did, or nobody;
- the largest private memory of the driver, for batches of several sizes: all of a batch's rows are in flight at once.

    python -m benchmarks.driver [--rows 64 256 1024] [--iterations 12]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import descendants, print_setting, process_cpu_s, stat_fields
from examples.demo_data import Sizes, write_base_model, write_data

ROOT = Path(__file__).parent.parent
SIZES = Sizes(pretrain=10, sft=10, preferences=10, prompts=8000, heldout=10)
PERIOD_S = 0.05
ROLE_TITLES = ("ray::Host", "ray::AsyncHost", "VLLM::")


@dataclass
class Watch:
    """What was seen of a run, from its first iteration's end to its last's."""

    moments: int = 0
    roles_busy: int = 0
    #: Of the moments in which no role was busy.
    driver_busy: int = 0
    ray_busy: int = 0
    wall_s: float = 0.0
    driver_cpu_s: float = 0.0
    roles_cpu_s: float = 0.0
    memory_bytes: list[int] = field(default_factory=list)

    def look(self, driver: int, started: dict[int, str]) -> None:
        """Look at every process once. ``started`` names the ones that the driver started."""
        self.moments += 1
        roles = [pid for pid, title in started.items() if title.startswith(ROLE_TITLES)]
        if any(is_busy(pid) for pid in roles):
            self.roles_busy += 1
        elif is_busy(driver):
            self.driver_busy += 1
        elif any(is_busy(pid) for pid in started if pid not in roles):
            self.ray_busy += 1
        self.memory_bytes.append(private_bytes(driver))


def is_busy(pid: int) -> bool:
    """Does one of a process's threads run, or wait for a core only?"""
    try:
        return any(stat_fields(task / "stat")[0] == "R" for task in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False


def private_bytes(pid: int) -> int:
    """Memory that is a process's own: neither shared nor of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def titles(pids: list[int]) -> dict[int, str]:
    """What processes call themselves."""
    found = {}
    for pid in pids:
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def cpu_of(pids: list[int]) -> float:
    """Processor time of processes."""
    return sum(process_cpu_s(pid) for pid in pids)


def run(home: Path, name: str, num_rows: int, iterations: int, *words: str) -> tuple[Watch, list[dict[str, float]]]:
    """Carry out a run and watch it; returns what was seen, and the run's metrics by iteration."""
    folder, watch = home / "runs" / name, Watch()
    command = [
        *(sys.executable, "-m", "launch", "train", str(ROOT / "examples" / "ppo.yaml")),
        *(f"run.name={name}", f"run.num_iterations={iterations}", f"online.batch_size={num_rows}", *words),
        f"rollout.prompts_in_flight_per_engine={num_rows}",
        "algorithm.critic_warmup_iterations=0",
    ]
    environment = {**os.environ, "TROUPE_HOME": str(home)}
    log = home / f"{name}.log"
    with log.open("w") as out, subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None and num_steps(folder) < 1:
            time.sleep(PERIOD_S)
        started = titles(descendants(process.pid))
        roles = [pid for pid, title in started.items() if title.startswith(ROLE_TITLES)]
        began = time.perf_counter()
        before = (process_cpu_s(process.pid), cpu_of(roles)) if process.poll() is None else (0.0, 0.0)
        while process.poll() is None and num_steps(folder) < iterations:
            watch.look(process.pid, started)
            # Taken at each look, because at the end the processes are gone.
            watch.wall_s = time.perf_counter() - began
            watch.driver_cpu_s = process_cpu_s(process.pid) - before[0]
            watch.roles_cpu_s = cpu_of(roles) - before[1]
            time.sleep(PERIOD_S)
    if process.returncode:
        raise SystemExit(f"the run failed:\n{log.read_text()[-3000:]}")
    return watch, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def num_steps(folder: Path) -> int:
    """Iterations that a run has done."""
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def report(num_rows: int, watch: Watch, steps: list[dict[str, float]]) -> None:
    """Print one run's line."""
    idle = watch.moments - watch.roles_busy
    shares = [100 * count / watch.moments for count in (idle, watch.driver_busy, watch.ray_busy)]
    seconds = sorted(step["time/total_s"] for step in steps[1:])
    all_cpu = watch.driver_cpu_s + watch.roles_cpu_s
    print(
        f"{num_rows:6} {seconds[len(seconds) // 2]:12.2f} {100 * watch.driver_cpu_s / watch.wall_s:13.1f} "
        f"{100 * watch.driver_cpu_s / all_cpu:12.1f} {shares[0]:10.1f} {shares[1]:12.1f} {shares[2]:10.1f} "
        f"{max(watch.memory_bytes) / 1e6:11.1f}",
        flush=True,
    )


def write_models(home: Path) -> None:
    """The demo's data, and random models under the names that its configuration uses."""
    data = home / "runs" / "demo-data"
    write_data(data, seed=0, sizes=SIZES)
    write_base_model(data / "base")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name, auto in (
        ("demo-sft", transformers.AutoModelForCausalLM),
        ("demo-reward", transformers.AutoModelForSequenceClassification),
    ):
        config = transformers.AutoConfig.from_pretrained(data / "base")
        config.num_labels = 1
        auto.from_config(config).save_pretrained(home / "runs" / name / "model")
        transformers.AutoTokenizer.from_pretrained(data / "base").save_pretrained(home / "runs" / name / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for troupe train")
    given = parser.parse_args()
    print_setting(
        "the driver of a PPO run",
        {
            "run": f"examples/ppo.yaml with random weights, {given.iterations} iterations {' '.join(given.overrides)}",
            "rows": "samples of a batch, all in flight at once",
            "sampled": f"every {PERIOD_S * 1000:.0f} ms after the first iteration",
        },
    )
    print("\n                          driver's CPU, % of        moments with no role busy, %      driver's")
    print("  rows  iteration s     wall time  all CPU time      all   driver busy   Ray busy   memory MB")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for num_rows in given.rows:
            watch, steps = run(Path(folder), f"rows-{num_rows}", num_rows, given.iterations, *given.overrides)
            report(num_rows, watch, steps)


if __name__ == "__main__":
    main()
