"""The worked examples in the docstrings are right."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch


@pytest.mark.parametrize(
    "name", ["advantages", "calibration", "kl", "logprobs", "preferences", "ranking", "rewards", "schedules"]
)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"algorithms.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
