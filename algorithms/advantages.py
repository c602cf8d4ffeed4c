"""Generalised advantage estimation over packed samples, and whitening.

Legend: N samples, T their response tokens laid end to end; ``offsets`` (N+1,) int64 are where samples begin and end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.shapes import require_offsets, require_same_length


def gae(rewards_T: Tensor, values_T: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (T,) each (Schulman et al. 2016, equations 11 and 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t``; ``A_t = delta_t + gamma lam A_{t+1}``; ``return_t = A_t + V_t``.
    ``values_T`` are of the prefixes before each token. The value after a sample's last token is 0: an episode ends
    with its response, also where that was cut off. A sample of no tokens is allowed and changes nothing.

    The recursion is solved by doubling (Hillis and Steele 1986), in the packed layout: after step k a token holds
    the sum over the next 2^k deltas of its sample, and adds the one that stands 2^k further on, discounted. That is
    log2(longest response) passes over T, with no loop over samples or tokens and no padding. What a token gets
    depends on the distance to its neighbours only, so it is the same, bit by bit, wherever its sample stands.

    >>> one = torch.ones(2)
    >>> gae(torch.tensor([0.0, 1.0]), 0.5 * one, torch.tensor([0, 2]), gamma=1.0, lam=0.5)
    (tensor([0.2500, 0.5000]), tensor([0.7500, 1.0000]))

    Raises:
        ShapeMismatch: rewards and values differ in length, or offsets do not cover them.
    """
    require_same_length(rewards=rewards_T, values=values_T)
    require_offsets(offsets, len(rewards_T))
    lengths = offsets.diff()
    ends = offsets[1:].repeat_interleave(lengths)
    #: Tokens of the same sample after each token.
    remaining_T = ends - 1 - torch.arange(len(rewards_T), device=offsets.device)
    next_values_T = values_T.roll(-1).masked_fill_(remaining_T == 0, 0)
    advantages_T = rewards_T + gamma * next_values_T - values_T
    longest = int(lengths.max()) if len(lengths) else 0
    distance, discount = 1, gamma * lam
    while distance < longest:
        # Filled, not multiplied by 0: a NaN must not leave its sample.
        further_T = (discount * advantages_T[distance:]).masked_fill_(remaining_T[:-distance] < distance, 0)
        advantages_T[:-distance] += further_T
        distance, discount = 2 * distance, discount * discount
    return advantages_T, advantages_T + values_T


def whiten(x: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scaled to variance 1, and to mean 0 unless ``shift_mean`` is false; of the same shape.

    ``(x - mean) / sqrt(var + eps)``, plus the mean where it is kept. The variance is the biased one, over all
    elements, as in lm-human-preferences (``utils/core.py: whiten``; TRL and verl take the unbiased one), so a single
    element is no special case. A constant ``x`` becomes 0, or stays where the mean is kept.

    Give it the tokens of the whole global batch: whitening parts apart makes the result depend on how it was cut.
    """
    if not x.numel():
        return x
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var(correction=0) + eps)
    return white if shift_mean else white + mean
