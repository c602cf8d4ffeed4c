"""The same mathematics as ``algorithms``, in Python loops over single numbers: slow, and independent of it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def samples(values_T: Tensor, offsets: Tensor) -> list[Tensor]:
    """Packed values as one tensor a sample."""
    return [values_T[begin:end] for begin, end in pairwise(offsets.tolist())]


def offsets_of(lengths: list[int]) -> Tensor:
    """Where samples of these lengths begin and end."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds, dtype=torch.int64)


def logprob(logits: list[float], target: int, temperature: float) -> float:
    """By the definition of softmax, with math.exp."""
    weights = [math.exp(logit / temperature) for logit in logits]
    return math.log(weights[target] / sum(weights))


def entropy(logits: list[float], temperature: float) -> float:
    weights = [math.exp(logit / temperature) for logit in logits]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w > 0)


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """One sample, by the definition: A_t is the sum of (gamma lam)^l delta_{t+l} (equation 16), no recursion."""
    length = len(rewards)
    later = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * later[t] - values[t] for t in range(length)]
    advantages = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length)) for t in range(length)]
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def whiten(numbers: list[float], shift_mean: bool = True) -> list[float]:
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / len(numbers)
    return [(x - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean) for x in numbers]


def shape_score(score: float, finished: bool, clip: float | None, replacement: float | None, penalty: float) -> float:
    if clip is not None:
        score = min(max(score, -clip), clip)
    if not finished:
        score = (score if replacement is None else replacement) - penalty
    return score


def rewards(score: float, behaviour: list[float], reference: list[float], coefficient: float) -> list[float]:
    """One sample's rewards: the penalty on every token, the score on the last."""
    penalties = [-coefficient * (p - q) for p, q in zip(behaviour, reference, strict=True)]
    return [*penalties[:-1], penalties[-1] + score]


def policy_objective(policy: Tensor, behaviour: float, advantage: float, clip: float) -> Tensor:
    """min(r A, clip(r) A) of one token, with plain comparisons; differentiable in ``policy``, a scalar."""
    plain = torch.exp(policy - behaviour) * advantage
    ratio = math.exp(policy.item() - behaviour)
    if ratio > 1 + clip:
        clipped = torch.tensor((1 + clip) * advantage, dtype=policy.dtype)
    elif ratio < 1 - clip:
        clipped = torch.tensor((1 - clip) * advantage, dtype=policy.dtype)
    else:
        clipped = plain
    return clipped if clipped.item() < plain.item() else plain


def value_error(value: Tensor, rollout_value: float, target: float, clip: float | None) -> Tensor:
    """Half the larger of both squared errors of one token; differentiable in ``value``, a scalar."""
    plain = (value - target) ** 2
    if clip is None or abs(value.item() - rollout_value) <= clip:
        return plain / 2
    edge = rollout_value + clip if value.item() > rollout_value else rollout_value - clip
    clipped = (edge - target) ** 2
    return torch.tensor(clipped / 2, dtype=value.dtype) if clipped > plain.item() else plain / 2
