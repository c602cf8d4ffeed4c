"""What the benchmarks run can be run."""

from __future__ import annotations

import pytest

from benchmarks.algorithms import ROOT, STARTS, WAYS
from launch.config import OnlineRunConfig
from launch.configfile import load


@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_a_configuration_that_holds(way: str) -> None:
    yaml, *changes = WAYS[way]
    config = load(ROOT / "examples" / yaml, changes)
    assert isinstance(config, OnlineRunConfig)
    assert config.run.num_iterations == 30 and config.online.batch_size == 256, "all have the same budget"


def test_the_ways_that_begin_elsewhere_are_there() -> None:
    assert set(STARTS) <= set(WAYS)
