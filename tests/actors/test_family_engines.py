"""Families whose weights in memory are not those of their files, in a real engine that follows the policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from actors.config import ModelConfig
from actors.exports import saved_form
from actors.models import PackedModel, load_causal_lm
from tests.actors import families, rollouts

pytestmark = [
    pytest.mark.usefixtures("vllm_surroundings"),
    pytest.mark.filterwarnings(rollouts.IGNORED_WARNINGS),
    pytest.mark.timeout(240),
]

#: Heads 32 wide, for vLLM on CPU.
HEADS: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2}
CHANGES = {"mixtral": HEADS | {"num_key_value_heads": 2, "head_dim": 32}, "gpt_neox": HEADS}


class Sent:
    """A policy's weights as they are sent."""

    def __init__(self, policy: PackedModel) -> None:
        self._policy = policy

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._policy.network.named_parameters():
            yield from saved_form(self._policy, name, weight.detach())


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_neox", marks=pytest.mark.slow)])
async def test_an_engine_follows_the_policy(name: str, tmp_path: Path) -> None:
    """Trap: a reload leaves a mixture's experts unpacked under a kernel that takes them for packed."""
    folder = families.write(tmp_path, name, **CHANGES[name])
    engine = rollouts.actor(folder, rollouts.config(max_model_tokens=128))
    try:
        for version in (1, 2):
            changed = rollouts.changed(folder, version)
            policy = load_causal_lm(ModelConfig(path=str(folder), dtype="float32"))
            policy.network.load_state_dict(changed.state_dict())
            await rollouts.publish(engine, Sent(policy), version)
            sampled, _ = await engine.generate(rollouts.prompts([3, 20, 9], first_id=10 * version), [0, 1, 2])
            assert rollouts.worst(changed, sampled) < 1e-4
    finally:
        await engine.shutdown()
