"""The worked examples in the docstrings are right."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

EXAMPLES = [
    "advantages",
    "averages",
    "calibration",
    "combining",
    "group_advantages",
    "kl",
    "logprobs",
    "moments",
    "packed",
    "passk",
    "preferences",
    "ranking",
    "rewards",
    "schedules",
    "shaping",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"algorithms.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
