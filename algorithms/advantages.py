"""Generalised advantage estimation over packed samples, and whitening.

Legend: N samples, T their response tokens laid end to end; ``offsets`` (N+1,) int64 are where samples begin and end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards_T: Tensor, values_T: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (T,) each (Schulman et al. 2016, equation 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t``; ``A_t = delta_t + gamma lam A_{t+1}``; ``return_t = A_t + V_t``.
    The value after a sample's last token is 0: an episode ends with its response, also where that was cut off.

    The recursion runs over time, for all samples at once: as many steps as the longest response has tokens.
    """
    lengths = offsets.diff()
    num_samples, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    next_values = torch.cat([values_T[1:], values_T.new_zeros(min(1, len(values_T)))])
    next_values = next_values.index_fill(0, offsets[1:] - 1, 0)
    delta_T = rewards_T + gamma * next_values - values_T
    # Dense only here, aligned at the last token, so that padding lies before a sample and nothing flows out of it.
    row = torch.arange(num_samples).repeat_interleave(lengths)
    place = torch.arange(len(delta_T)) - offsets[:-1][row] + (longest - lengths)[row]
    delta_NL = delta_T.new_zeros(num_samples, longest).index_put((row, place), delta_T)
    running = delta_T.new_zeros(num_samples)
    columns: list[Tensor] = []
    for step in range(longest - 1, -1, -1):
        running = delta_NL[:, step] + gamma * lam * running
        columns.append(running)
    advantages_T = torch.stack(columns[::-1], dim=1)[row, place] if columns else delta_T
    return advantages_T, advantages_T + values_T


def whiten(x: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scaled to variance 1 (biased, over all elements), and to mean 0 unless ``shift_mean`` is false.

    Give it the tokens of the whole global batch: whitening parts apart makes the result depend on how it was cut.
    """
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var(correction=0) + eps)
    return white if shift_mean else white + mean
