"""Reward functions that do what reward functions do, right and wrong."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import numpy as np


def length(response: str) -> int:
    return len(response)


def closer(response: str, answer: float, **columns: Any) -> float:
    return -abs(float(response) - answer) - len(columns)


def everything(prompt: str, response: str, finished: bool, **columns: Any) -> float:
    assert prompt == "P" and finished
    return float(response) + float(columns["answer"])


def batch_of_halves(response: list[str], answer: list[float]) -> list[float]:
    return [float(text) / 2 + wanted for text, wanted in zip(response, answer, strict=True)]


def one_too_few(response: list[str]) -> list[float]:
    return [1.0] * (len(response) - 1)


def as_told(response: str) -> object:
    """Goes wrong in the way that the response names."""
    print("a line on standard output, which carries the answers")
    match response:
        case "hang":
            while True:
                time.sleep(1)
        case "die":
            os._exit(3)
        case "raise":
            raise ValueError("as told")
        case "none":
            return None
        case "nan":
            return float("nan")
        case "text":
            return "1.0"
        case "true":
            return True
        case "shape":
            return [1.0]
        case "huge":
            return 1e39
        case "array":
            return np.array([2.0])
        case "isclose":
            return np.isclose(1.0, 1.0)
        case _:
            return len(response)


async def slow(response: str) -> float:
    await asyncio.sleep(30 if response.lower() == "hang" else 0.05)
    if response == "cancel":
        raise asyncio.CancelledError
    if response == "raise":
        raise ValueError("as told")
    return float(len(response))


_seen: dict[str, int] = {}


async def second_time(response: str) -> float | None:
    """Has a score from the second time on, but never for ``NEVER``."""
    _seen[response] = _seen.get(response, 0) + 1
    return 2.0 if _seen[response] > 1 and response != "NEVER" else None
