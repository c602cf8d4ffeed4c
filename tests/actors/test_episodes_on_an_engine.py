"""Episodes on a real engine: log-probs of every turn are the trainer's, and the cache serves what came before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import transformers

from actors.config import EnvironmentConfig
from actors.packed import Samples
from actors.rollout import RolloutActor
from experience.table import join
from tests.actors import rollouts

pytestmark = [
    pytest.mark.usefixtures("vllm_surroundings"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS),
    pytest.mark.timeout(240),
]

TOLERANCE = 1e-4
LENGTHS = [5, 17, 140, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rollouts.write_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path) -> AsyncIterator[RolloutActor]:
    """Three turns of up to 12 tokens, two samples of each prompt; version 1 of the weights."""
    environment = EnvironmentConfig(path="tests.actors.games:Echo", max_turns=3, max_tokens=64)
    sampling = {"max_response_tokens": 12, "samples_per_prompt": 2, "temperature": 0.8, "stop": ("A", "B")}
    actor = rollouts.actor(model, rollouts.config(sampling, environment=environment))
    await rollouts.publish(actor, rollouts.changed(model, seed=1), 1)
    yield actor
    await actor.shutdown()


@torch.no_grad()
def slow_logprobs(network: Any, row: dict[str, Any], temperature: float) -> list[float]:
    """Of the turns' tokens, each from a forward over what stands before it."""
    logits = network(torch.tensor([row["tokens"]])).logits[0].double() / temperature
    logprobs = logits.log_softmax(-1)
    places = [p for pair in zip(row["turn_starts"], row["turn_ends"], strict=True) for p in range(*pair)]
    return [float(logprobs[place - 1, row["tokens"][place]]) for place in places]


async def test_logprobs_of_turns_are_the_trainers(engine: RolloutActor, model: Path) -> None:
    batch, info = await engine.generate(rollouts.prompts(LENGTHS), [0, 1, 2, 3])
    network = rollouts.changed(model, seed=1)
    rows = batch.to_pylist()
    assert [len(row["turn_starts"]) for row in rows] == [3] * 8 and not info.dropped
    assert info.num_tokens == sum(len(row["rollout_logprobs"]) for row in rows)
    for row in rows:
        assert row["rollout_logprobs"] == pytest.approx(slow_logprobs(network, row, 0.8), abs=TOLERANCE)
        assert [reward for reward in row["environment_rewards"] if reward] == [1.0, 2.0, 3.0]
        assert len(row["environment_rewards"]) == len(row["rollout_logprobs"]) and set(row["policy_versions"]) == {1}
        assert row["turn_starts"][0] == row["num_prompt_tokens"] == LENGTHS[row["prompt_id"]] + 1
        assert row["turn_ends"][-1] == len(row["tokens"])
    # The samples of a prompt play the same game, and their policies draw apart.
    assert all(a["tokens"][a["num_prompt_tokens"] - 1] == b["tokens"][b["num_prompt_tokens"] - 1]
               for a, b in zip(rows[::2], rows[1::2], strict=True))  # fmt: skip
    assert all(a["tokens"] != b["tokens"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert join([batch]).num_rows == 8


async def test_the_trainer_takes_the_same_tokens(engine: RolloutActor, model: Path) -> None:
    """What is packed for training are the turns' tokens, and the log-probs there are the engine's."""
    batch, _ = await engine.generate(rollouts.prompts(LENGTHS), [1, 3])
    packed = Samples(batch).pack([2, 0, 1], torch.device("cpu"))
    rows = [batch.to_pylist()[row] for row in (2, 0, 1)]
    drawn = [row["tokens"][at] for row in rows
             for pair in zip(row["turn_starts"], row["turn_ends"], strict=True) for at in range(*pair)]  # fmt: skip
    assert packed.targets_S.tolist() == drawn
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.load_state_dict(rollouts.changed(model, seed=1).state_dict())
    offsets, logprobs = packed.packed.offsets.tolist(), []
    with torch.no_grad():
        for start, stop in pairwise(offsets):
            logits = network(packed.packed.tokens[None, start:stop]).logits[0] / 0.8
            logprobs.append(logits.log_softmax(-1))
    at = torch.cat(logprobs)[packed.positions_S, packed.targets_S].tolist()
    assert at == pytest.approx([number for row in rows for number in row["rollout_logprobs"]], abs=TOLERANCE)


async def test_an_episode_depends_on_its_id_alone(engine: RolloutActor) -> None:
    prompts = rollouts.prompts(LENGTHS)
    together = rollouts.rows((await engine.generate(prompts, [0, 1, 3]))[0])
    alone = rollouts.rows((await engine.generate(prompts, [3]))[0])
    assert all(together[sample]["tokens"] == row["tokens"] for sample, row in alone.items())
    greedy, _ = await engine.generate(prompts, [1, 3], greedy=True)
    assert greedy.column("sample_id").to_pylist() == [1, 3] and greedy.num_rows == 2


async def test_later_turns_find_their_prefix_in_the_cache(
    engine: RolloutActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of the cache is 128 tokens on CPU; the third prompt alone fills one."""
    found: dict[str, int] = {}
    generate = engine._engine.generate

    async def told(name: str, prompt: Any, params: Any) -> Any:
        done = await generate(name, prompt, params)
        found[name] = done.num_cached_tokens
        return done

    monkeypatch.setattr(engine._engine, "generate", told)
    await engine.generate(rollouts.prompts([140], seed=3), [0])
    later = [cached for name, cached in found.items() if not name.endswith("-0")]
    assert len(later) == 4 and min(later) >= 128


async def test_prompts_of_faulty_episodes_are_left_out(engine: RolloutActor, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = engine._episodes
    assert episodes is not None
    from tests.actors.games import Faulty

    options = {"how": "raised", "everywhere": True}
    monkeypatch.setattr(episodes, "_make", Faulty)
    monkeypatch.setattr(episodes, "_config", episodes._config.model_copy(update={"options": options}))
    batch, info = await engine.generate(rollouts.prompts([4, 5]), [0, 1])
    assert batch.num_rows == 0 and info.prompt_ids == () and info.num_samples == 0
    assert info.dropped == {0: "environment raised", 1: "environment raised"}
    await asyncio.sleep(0)
