"""Between samples and their tokens: numbers of samples given to tokens, and numbers of tokens added up by sample.

Legend: N samples, T tokens of all of them laid end to end; ``offsets`` (N+1,) int64 are where samples begin and end.

What a sample gets depends on its own tokens only, bit by bit, wherever it stands: a NaN stays in its sample, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.shapes import require_offsets, require_same_length


def spread(numbers_N: Tensor, offsets: Tensor) -> Tensor:
    """Each sample's number on each of its tokens, (T,). Differentiable.

    >>> spread(torch.tensor([1.0, 2.0]), torch.tensor([0, 1, 3]))
    tensor([1., 2., 2.])

    Raises:
        ShapeMismatch: there are more or fewer numbers than samples, or the offsets do not rise from 0.
    """
    num_tokens = int(offsets[-1]) if offsets.dim() == 1 and len(offsets) else 0
    require_offsets(offsets, num_tokens)
    require_same_length(numbers=numbers_N, lengths=offsets[1:])
    return numbers_N.repeat_interleave(offsets.diff().to(numbers_N.device), output_size=num_tokens)


def sample_sums(values_T: Tensor, offsets: Tensor) -> Tensor:
    """The sum over each sample's tokens, (N,); of no tokens it is 0. Differentiable.

    >>> sample_sums(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 3]))
    tensor([1., 5.])

    Raises:
        ShapeMismatch: the offsets do not cover the tokens.
    """
    require_same_length(values=values_T)
    require_offsets(offsets, len(values_T))
    return torch.segment_reduce(values_T, "sum", offsets=offsets.to(values_T.device), initial=0)


def sample_means(values_T: Tensor, offsets: Tensor) -> Tensor:
    """The mean over each sample's tokens, (N,); of no tokens it is 0. Differentiable.

    Raises:
        ShapeMismatch: the offsets do not cover the tokens.
    """
    sums_N = sample_sums(values_T, offsets)
    return sums_N / offsets.diff().clamp(min=1).to(sums_N)
