"""Starting, stopping and reading whole runs, as a user does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
Troupe = Callable[..., subprocess.CompletedProcess[str]]

#: The demo's PPO, cut short. Eight samples a minibatch on two ranks, so that some packs are empty.
PPO = (
    str(ROOT / "examples" / "ppo.yaml"),
    "run.name=ppo",
    "run.num_iterations=4",
    "run.checkpoint_every=2",
    "run.keep_checkpoints=5",
    "run.keep_experience=true",
    "online.batch_size=32",
    "online.scoring_batch_size=8",
    "algorithm.critic_warmup_iterations=1",
    "algorithm.kl.coefficient=0.1",
    "algorithm.kl.target=1.0",
    "rollout.sampling.samples_per_prompt=2",
)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learnt(row: Mapping[str, float]) -> dict[str, float]:
    """What a step learned: everything in its row but the time it took."""
    timed = ("time/", "tokens_per_s/", "driver/", "publish/time")
    return {
        name: value for name, value in row.items() if not name.startswith(timed) and "tokens_per_second" not in name
    }


def check_done(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]


@contextmanager
def served(model: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A reward model behind ``troupe serve-reward``: its address, once it can score, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = (sys.executable, "-m", "launch", "serve-reward", str(model), "--port", str(port), "--dtype", "float32")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file, subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, env=environment) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()


def stop(home: Path, words: Sequence[str], *, at_line: str = "", at_file: Path | None = None) -> list[str]:
    """Start a run and send it SIGTERM, at a line that begins so or once a file is there; the lines that it printed."""
    with subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=ROOT,
        env={**os.environ, "TROUPE_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        while at_file is not None and not at_file.exists():
            assert process.poll() is None, process.stdout.read()[-3000:]
            time.sleep(0.05)
        told: list[str] = []
        while at_line and not (told and told[-1].startswith(at_line)):
            line = process.stdout.readline()
            assert line, "".join(told)[-3000:]
            told.append(line)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        told += process.stdout.readlines()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM, "".join(told)[-3000:]
        # A step, or the rest of the start of all roles.
        assert time.monotonic() - began < (60 if at_line else 120)
    assert "stopped by SIGTERM after step" in told[-1] and "--resume" in told[-1]
    return told
