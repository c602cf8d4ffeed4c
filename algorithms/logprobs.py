"""Log-probabilities of given tokens, and entropy, from logits.

Legend: T tokens, V vocabulary.

Invariants:

- Arithmetic is in float32 at least, whatever the logits are in; float64 stays float64.
- Nothing of size T x V is made or kept besides the logits themselves, and in backward their gradient in their own
  precision: softmax and float32 copies exist for one chunk of tokens at a time and are made again in backward. At
  8,192 tokens and a vocabulary of 150,000 in bfloat16 autograd's own way would keep 2 x 4.9 GB until backward.
- What a token gets does not depend on the tokens beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from algorithms.errors import AlgorithmError, ShapeMismatch

#: Logits raised at a time. On a CPU what fits its cache (1 MiB of float32) is 2 to 5 times as fast as 64 MiB; an
#: accelerator wants few large kernels.
CPU_CHUNK_ELEMENTS = 1 << 18
ACCELERATOR_CHUNK_ELEMENTS = 16 << 20


def token_logprobs(logits_TV: Tensor, targets_T: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under ``softmax(logits / temperature)``, (T,), float32 or float64 as the logits.

    ``l_y - logsumexp(l)`` with ``l = logits / temperature``. Differentiable once, in the logits.

    >>> token_logprobs(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([-0.6931])

    Args:
        logits_TV: (T, V), of any floating type.
        targets_T: (T,) int64, each from 0 to V - 1.
        temperature: the one that the tokens were sampled at, above 0.

    Raises:
        ShapeMismatch: logits are not (T, V) or targets not (T,).
        AlgorithmError: the temperature is not positive.
        RuntimeError: from torch, a target outside the vocabulary (on an accelerator, when it next synchronises).
    """
    _check(logits_TV, temperature)
    if targets_T.shape != logits_TV.shape[:1]:
        shapes = f"logits {tuple(logits_TV.shape)} and targets {tuple(targets_T.shape)}"
        raise ShapeMismatch(f"{shapes}: one target for each row of logits")
    logprobs_T: Tensor = _TokenLogprobs.apply(logits_TV, targets_T, temperature)  # type: ignore[no-untyped-call]
    return logprobs_T


def entropy(logits_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of ``softmax(logits / temperature)`` in nats at each position, (T,), float32 or float64 as the logits.

    ``-sum p log p``; a logit of minus infinity counts 0. Differentiable once.

    >>> entropy(torch.zeros(1, 2))
    tensor([0.6931])

    Raises:
        ShapeMismatch: logits are not (T, V).
        AlgorithmError: the temperature is not positive.
    """
    _check(logits_TV, temperature)
    entropy_T: Tensor = _Entropy.apply(logits_TV, temperature)  # type: ignore[no-untyped-call]
    return entropy_T


class _TokenLogprobs(torch.autograd.Function):
    """d logprob / d logit_j = (1[j = y] - p_j) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, temperature: float) -> Tensor:
        logprobs_T, normaliser_T = (logits_TV.new_empty(len(logits_TV), dtype=_raised(logits_TV)) for _ in range(2))
        for part, scaled in _scaled_chunks(logits_TV, temperature):
            normaliser_T[part] = scaled.logsumexp(-1)
            logprobs_T[part] = scaled.gather(-1, targets_T[part, None])[:, 0] - normaliser_T[part]
        ctx.save_for_backward(logits_TV, targets_T, normaliser_T)
        ctx.temperature = temperature
        return logprobs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, targets_T, normaliser_T = ctx.saved_tensors
        gradient_TV = torch.empty_like(logits_TV)
        slope_T = grad_T / ctx.temperature
        for part, scaled in _scaled_chunks(logits_TV, ctx.temperature):
            raised = (scaled - normaliser_T[part, None]).exp_().mul_(-slope_T[part, None])
            gradient_TV[part] = raised.scatter_add_(-1, targets_T[part, None], slope_T[part, None])
        return gradient_TV, None, None


class _Entropy(torch.autograd.Function):
    """d H / d logit_j = -p_j (log p_j + H) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, temperature: float) -> Tensor:
        entropy_T = logits_TV.new_empty(len(logits_TV), dtype=_raised(logits_TV))
        for part, scaled in _scaled_chunks(logits_TV, temperature):
            entropy_T[part] = torch.special.entr(scaled.softmax(-1)).sum(-1)
        ctx.save_for_backward(logits_TV, entropy_T)
        ctx.temperature = temperature
        return entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        logits_TV, entropy_T = ctx.saved_tensors
        gradient_TV = torch.empty_like(logits_TV)
        slope_T = grad_T / ctx.temperature
        for part, scaled in _scaled_chunks(logits_TV, ctx.temperature):
            probabilities = scaled.softmax(-1)
            raised = torch.special.entr(probabilities) - probabilities * entropy_T[part, None]
            gradient_TV[part] = raised.mul_(slope_T[part, None])
        return gradient_TV, None


def _check(logits_TV: Tensor, temperature: float) -> None:
    if logits_TV.dim() != 2:
        raise ShapeMismatch(f"logits are (T, V), got shape {tuple(logits_TV.shape)}")
    if not temperature > 0:
        raise AlgorithmError(f"temperature {temperature}; it must be above 0")


def _raised(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scaled_chunks(logits_TV: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows, and ``logits / temperature`` of each, raised."""
    num_elements = CPU_CHUNK_ELEMENTS if logits_TV.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    num_rows = max(1, num_elements // max(1, logits_TV.shape[1]))
    for first in range(0, len(logits_TV), num_rows):
        part = slice(first, first + num_rows)
        raised = logits_TV[part].to(_raised(logits_TV))
        yield part, raised if temperature == 1.0 else raised / temperature
