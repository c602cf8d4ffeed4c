"""The same mathematics as ``algorithms.preferences``, one pair at a time, by the definitions.

Nothing here minds overflow. Arguments are scalars that autograd follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BETA, SMOOTHING, GAMMA, COEFFICIENT, MARGIN = 0.3, 0.2, 0.7, 0.4, 1.5


@dataclass(frozen=True)
class Pair:
    """Log-probs (sums) and lengths of a chosen (w) and a rejected (v) response."""

    policy_w: Tensor
    policy_v: Tensor
    ref_w: float
    ref_v: float
    length_w: int
    length_v: int


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def dpo_margin(pair: Pair) -> Tensor:
    """beta log((pi_w / ref_w) / (pi_v / ref_v)), in the order of the DPO authors' code."""
    return BETA * ((pair.policy_w - pair.policy_v) - (pair.ref_w - pair.ref_v))


def dpo(pair: Pair) -> Tensor:
    return -torch.log(sigmoid(dpo_margin(pair)))


def conservative(pair: Pair) -> Tensor:
    p = sigmoid(dpo_margin(pair))
    return -(1 - SMOOTHING) * torch.log(p) - SMOOTHING * torch.log(1 - p)


def robust(pair: Pair) -> Tensor:
    p = sigmoid(dpo_margin(pair))
    return (-(1 - SMOOTHING) * torch.log(p) + SMOOTHING * torch.log(1 - p)) / (1 - 2 * SMOOTHING)


def ipo(pair: Pair) -> Tensor:
    h = (pair.policy_w - pair.policy_v) - (pair.ref_w - pair.ref_v)
    return (h - 1 / (2 * BETA)) ** 2


def hinge(pair: Pair) -> Tensor:
    slack = 1 - dpo_margin(pair)
    return slack if slack.item() > 0 else 0 * slack


def slic(pair: Pair) -> Tensor:
    slack = MARGIN - pair.policy_w + pair.policy_v
    return slack if slack.item() > 0 else 0 * slack


def reference_free(pair: Pair) -> Tensor:
    return -torch.log(sigmoid(BETA * (pair.policy_w - pair.policy_v)))


def simpo(pair: Pair) -> Tensor:
    margin = BETA / pair.length_w * pair.policy_w - BETA / pair.length_v * pair.policy_v - GAMMA
    return -torch.log(sigmoid(margin))


def odds(logprob: Tensor, length: int) -> Tensor:
    p = torch.exp(logprob / length)
    return p / (1 - p)


def orpo(pair: Pair) -> Tensor:
    ratio = odds(pair.policy_w, pair.length_w) / odds(pair.policy_v, pair.length_v)
    return -COEFFICIENT * torch.log(sigmoid(torch.log(ratio)))


def nll(pair: Pair) -> Tensor:
    return -COEFFICIENT * pair.policy_w / pair.length_w


def kto(policy: Tensor, ref: float, desirable: bool, baseline: float, weights: tuple[float, float]) -> Tensor:
    """lambda_y - v(x, y), v the value of the paper; weights of the desirable and of the others."""
    gain = policy - ref - max(baseline, 0.0)
    if desirable:
        return weights[0] - weights[0] * sigmoid(BETA * gain)
    return weights[1] - weights[1] * sigmoid(-BETA * gain)
