"""The page about the configuration is the one that the models give."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from launch.config import OnlineRunConfig, SupervisedRunConfig
from launch.fields import leaves
from launch.reference import page

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs` and commit docs/configuration.md"


@pytest.mark.parametrize("model", [OnlineRunConfig, SupervisedRunConfig])
def test_every_key_is_on_it_and_says_what_it_is(model: type[BaseModel]) -> None:
    text = page()
    for leaf in leaves(model):
        assert f"| `{leaf.path[-1]}` |" in text
        # `algorithm.name` needs no words: it is the kind of run.
        assert leaf.info.description or leaf.path == ("algorithm", "name"), f"{leaf.path} has no description"
