"""Log-probabilities of given tokens, and entropy, from logits.

Legend: T tokens, V vocabulary. Arithmetic is in float32 at least: lower-precision logits are raised chunk by
chunk, so that the raised copy of a long pack never exists as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Logits raised to float32 at a time: 64 Mi elements are 256 MiB.
CHUNK_ELEMENTS = 64 << 20


def token_logprobs(logits_TV: Tensor, targets_T: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under ``softmax(logits / temperature)``, (T,), float32 or float64 as the logits.

    Args:
        logits_TV: (T, V), of any floating type.
        targets_T: (T,) int64.
        temperature: the one that the tokens were sampled at.
    """
    parts = [
        _token_logprobs(logits, targets, temperature)
        for logits, targets in zip(_chunks(logits_TV), torch.split(targets_T, _rows(logits_TV)), strict=True)
    ]
    return torch.cat(parts)


def entropy(logits_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of ``softmax(logits / temperature)`` at each position, in nats, (T,): logsumexp(l) - sum softmax(l) l."""
    return torch.cat([_entropy(logits, temperature) for logits in _chunks(logits_TV)])


def _token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    scaled = _raised(logits) / temperature
    chosen: Tensor = scaled.gather(-1, targets[:, None])[:, 0]
    return chosen - scaled.logsumexp(-1)


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    scaled = _raised(logits) / temperature
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def _raised(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))


def _chunks(logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.split(logits, _rows(logits)))
