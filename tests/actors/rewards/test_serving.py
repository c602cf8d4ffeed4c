"""``troupe serve-reward`` on its two engines: the same scores, plain refusals, and an end where an engine dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from actors.config import ModelConfig
from actors.errors import EngineDead, ModelError, RolloutError
from actors.models import load_scorer
from actors.rewards import server
from actors.rewards.config import HttpRewardConfig
from actors.rewards.face import Answer, RewardFailure, RewardSample
from actors.rewards.scorers import Result, Sample, TransformersScorer, VLLMScorer, require_poolable
from actors.rewards.service import HttpReward
from launch.cli import app
from tests.actors import tiny_models
from tests.actors.ranks import free_port

ROOT = Path(__file__).parents[3]
BIAS = 2.5


@contextmanager
def served(folder: Path, log: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL of a server that scores, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "launch", "serve-reward", str(folder), "--port", str(port), "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *words], cwd=ROOT, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1) as response:
                assert json.load(response)["status"] == "ok"
                return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def answers(url: str, samples: list[RewardSample]) -> list[Answer]:
    async def asked() -> list[Answer]:
        service = HttpReward(HttpRewardConfig(endpoints=(url,), batch_size=5, timeout_s=40))
        try:
            return await service.score(samples)
        finally:
            await service.close()

    return asyncio.run(asked())


def expected(folder: Path, samples: list[RewardSample]) -> list[float]:
    """The score of each sample, alone in a forward pass of this process."""
    tokenizer, model = tiny_models.tokenizer(), load_scorer(ModelConfig(path=str(folder), dtype="float32"))
    scores = []
    for sample in samples:
        ids = tokenizer(sample.prompt + sample.response)["input_ids"] + [tokenizer.eos_token_id] * sample.finished
        scores.append(model(torch.tensor(ids), torch.arange(len(ids)))[-1].item())
    return scores


def test_a_served_model_scores_as_it_does_here(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "score", "llama", head="score", troupe_score_bias=BIAS)
    samples = [RewardSample("ASK", f" {'A' * n}", n % 2 == 0, {}) for n in range(12)]
    with served(folder, tmp_path / "log", "--max-tokens", "40") as (url, process):
        given = answers(url, [*samples, RewardSample("ASK", "A" * 50, True, {})])
        assert given[:-1] == pytest.approx(expected(folder, samples), abs=1e-5)
        last = given[-1]
        assert isinstance(last, RewardFailure) and "54 tokens; a sample has from 1 to 40" in last.detail
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.timeout(240)
def test_vllm_gives_the_same_scores_and_the_server_ends_with_its_engine(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "score", "llama", head="score", width=128, troupe_score_bias=BIAS)
    # Prompts that are shared, and longer than a block of the engine's cache; more tokens than one of its steps takes.
    prompts = ["ASK", "".join(chr(33 + n % 60) for n in range(150))]
    samples = [RewardSample(prompts[n % 2], f" {'AB' * n}", n % 3 == 0, {}) for n in range(24)]
    log = tmp_path / "log"
    with served(folder, log, "--engine", "vllm", "--max-tokens", "400") as (url, process):
        scores = expected(folder, samples)
        assert max(scores) - min(scores) > 1 and (min(scores) < 0 or max(scores) > 1), "no sigmoid would show"
        for _ in range(2):
            given = answers(url, [*samples, RewardSample("ASK", "A" * 300, True, {})])
            assert given[:-1] == pytest.approx(scores, abs=1e-4)
            last = given[-1]
            assert isinstance(last, RewardFailure) and "304 tokens; a sample has from 1 to 256" in last.detail
        _kill_engine(process)
        assert process.wait(30) == 1, log.read_text()
    assert "error: the engine is dead" in log.read_text()


def _kill_engine(process: subprocess.Popen[bytes]) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    engines = [child for child in children if "EngineCore" in Path(f"/proc/{child}/comm").read_text()]
    named = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
    engines = engines or [child for child, words in named.items() if "EngineCore" in words]
    assert len(engines) == 1, named
    os.kill(int(engines[0]), signal.SIGKILL)


def test_what_cannot_be_scored_with_is_refused(tmp_path: Path) -> None:
    def model(name: str, **form: Any) -> ModelConfig:
        return ModelConfig(path=str(tiny_models.write(tmp_path / name, "llama", **form)), dtype="float32")

    causal = model("causal")
    for refused in (require_poolable, lambda config: TransformersScorer(config, device="cpu", max_tokens=40)):
        with pytest.raises(ModelError, match=r"causal is no reward model: its architecture is LlamaForCausalLM"):
            refused(causal)
        with pytest.raises(ModelError, match=r"two has 2 labels"):
            refused(model("two", head="score", num_labels=2))
    with pytest.raises(ModelError, match=r"LlamaForTokenClassification with.*: use --engine transformers"):
        require_poolable(model("tokens", head="token_score"))
    good = model("good", head="score", troupe_score_bias=BIAS)
    assert require_poolable(good) == BIAS
    with pytest.raises(RolloutError, match=r"--device cuda:1: .* set CUDA_VISIBLE_DEVICES"):
        VLLMScorer(good, device="cuda:1", max_tokens=40)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_model_that_vllm_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "score"
    shape = transformers.GPTNeoConfig(
        vocab_size=tiny_models.VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        num_labels=1,
    )
    transformers.AutoModelForSequenceClassification.from_config(shape).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    command = [sys.executable, "-m", "launch", "serve-reward", str(folder), "--engine", "vllm"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    told = done.stderr.splitlines()[-1]
    assert told.startswith(f"error: vLLM cannot score with {folder}: ") and told.endswith("; use --engine transformers")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine", "tpu"], "engine 'tpu' is not known: transformers or vllm is expected"),
        (["--engine", "vllm", "--attention", "eager"], "--attention eager is for --engine transformers"),
        (["--engine", "vllm"], "model folder /no/such does not exist"),
    ],
)
def test_the_command_refuses_plainly(words: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["serve-reward", "/no/such", "--port", str(free_port()), *words])
    assert done.exit_code == 2 and told in done.stderr


class Dying:
    """A scorer whose engine dies at the first request."""

    num_waiting = 0

    def __init__(self, config: ModelConfig, *, device: str, max_tokens: int) -> None:
        self._asked = asyncio.Event()

    async def score(self, samples: Sequence[Sample]) -> list[Result]:
        self._asked.set()
        await asyncio.sleep(0.05)
        raise EngineDead("the engine is dead: it ran out")

    async def work(self) -> None:
        await self._asked.wait()
        raise EngineDead("the engine is dead: it ran out")

    def close(self) -> None:
        pass


def test_with_its_engine_a_server_ends_and_nobody_is_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.SCORERS, "dying", Dying)
    port = free_port()
    told: list[tuple[int, Any]] = []

    def ask() -> None:
        body = json.dumps({"samples": [{"prompt": "P", "response": "R"}]}).encode()
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/score", body, timeout=10)
            except urllib.error.HTTPError as error:
                with error:
                    told.append((error.code, json.load(error)))
                return
            except urllib.error.URLError:
                time.sleep(0.05)

    client = threading.Thread(target=ask)
    client.start()
    with pytest.raises(EngineDead, match="it ran out"):
        server.serve(ModelConfig(path="x"), engine="dying", host="127.0.0.1", port=port, device="cpu", max_tokens=9)
    client.join()
    assert told == [(503, {"error": "the engine is dead: it ran out"})]
