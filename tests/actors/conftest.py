"""Fixtures of the role tests: tiny models, processes that play ranks, and what engines need around them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.actors import rollouts, tiny_models
from tests.actors.ranks import Ranks


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models ``qwen2``, ``llama``, ``gpt2`` and the reward model ``score``."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.write(folder / "qwen2", "qwen2", tied=True)
    tiny_models.write(folder / "llama", "llama", tied=False)
    tiny_models.write(folder / "gpt2", "gpt2")
    tiny_models.write(folder / "score", "qwen2", head="score")
    return folder


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that are the ranks of one role."""
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One process that is the only rank of a role."""
    ranks = Ranks(1, tmp_path_factory.mktemp("rank"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def vllm_surroundings() -> Iterator[None]:
    """The environment that an engine's process is started with, for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rollouts.environment().items():
            patch.setenv(name, value)
        yield
        # Here, where warnings are ignored, and not at the session's end: vLLM leaves sockets to the collector.
        gc.collect()
