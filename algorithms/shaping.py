"""Shaping of scores, one function each, so that what each does can be logged apart.

Legend: N samples.

Two kinds, all of (N,):

- a **transform** takes scores and gives others: clip, normalise, replace. The order of transforms matters.
- a **term** is to be added to a score, and is never above 0: a penalty. The order of terms does not matter.

None changes what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from algorithms.errors import AlgorithmError
from algorithms.shapes import require_same_length


def clip_scores(scores_N: Tensor, low: float, high: float) -> Tensor:
    """Transform: scores within ``[low, high]`` (DeepSpeed-Chat: -5 and 5).

    Raises:
        AlgorithmError: the bounds do not rise.
    """
    if not low < high:
        raise AlgorithmError(f"scores are clipped to [{low}, {high}]; the bounds must rise")
    return scores_N.clamp(low, high)


def normalise_scores(scores_N: Tensor, mean: float, std: float) -> Tensor:
    """Transform: ``(score - mean) / std``.

    With constants, measured once on samples of the initial policy (Ziegler et al. 2019), or with those of
    ``moments.RunningMoments`` as they grow. Constants keep the meaning of a score over a run; moments do not.

    Raises:
        AlgorithmError: the deviation is not above 0.
    """
    if not std > 0:
        raise AlgorithmError(f"scores are divided by a deviation of {std}; it must be above 0")
    return (scores_N - mean) / std


def replace_unfinished(scores_N: Tensor, finished_N: Tensor, score: float) -> Tensor:
    """Transform: ``score`` in the place of that of a response that did not end by itself.

    (Ziegler et al. 2019, and Huang et al. 2024: -1.)

    Raises:
        ShapeMismatch: the two differ in length.
    """
    require_same_length(scores=scores_N, finished=finished_N)
    return scores_N.masked_fill(~finished_N.bool(), score)


def missing_eos_penalty(finished_N: Tensor, penalty: float) -> Tensor:
    """Term: ``-penalty`` for a response that did not end by itself (TRL), float32.

    Raises:
        AlgorithmError: the penalty is negative.
    """
    _require_not_negative(penalty=penalty)
    return 0.0 - penalty * (~finished_N.bool()).float()


def length_penalty(lengths_N: Tensor, penalty_per_token: float, free_tokens: int = 0) -> Tensor:
    """Term: ``-penalty_per_token`` for each token above ``free_tokens``, float32.

    Raises:
        AlgorithmError: the penalty or the number of free tokens is negative.
    """
    _require_not_negative(penalty_per_token=penalty_per_token, free_tokens=free_tokens)
    return 0.0 - penalty_per_token * (lengths_N - free_tokens).clamp(min=0).float()


def overlong_penalty(lengths_N: Tensor, *, max_tokens: int, margin_tokens: int) -> Tensor:
    """Term: DAPO's soft overlong punishment (Yu et al. 2025, equation 13), float32.

    0 up to ``max_tokens - margin_tokens``, then falling evenly, to -1 at ``max_tokens`` and beyond. The paper: 20,480
    and 4,096. (Its overlong *filtering* is another thing: unfinished samples carry no loss, so
    ``packed.spread(finished_N, offsets)`` multiplies into the loss's weights.)

    >>> overlong_penalty(torch.tensor([6, 8, 9, 10, 12]), max_tokens=10, margin_tokens=4)
    tensor([ 0.0000, -0.5000, -0.7500, -1.0000, -1.0000])

    Raises:
        AlgorithmError: the margin is not from 1 token to all of them.
    """
    if not 0 < margin_tokens <= max_tokens:
        raise AlgorithmError(f"a margin of {margin_tokens} of {max_tokens} tokens; it goes from 1 to all of them")
    over_N = lengths_N - (max_tokens - margin_tokens)
    return 0.0 - (over_N.clamp(0, margin_tokens) / margin_tokens).float()


def repetition_penalty(responses: Sequence[Sequence[int]], *, ngram: int, penalty: float) -> Tensor:
    """Term: ``-penalty`` times the share of a response's n-grams that stood in it before, float32.

    ``1 - distinct / all``; 0 where a response has no n-gram. ``a b a b a`` has the 2-grams ab, ba, ab, ba: half.

    >>> repetition_penalty([[1, 2, 1, 2, 1], [1, 2, 3]], ngram=2, penalty=1.0)
    tensor([-0.5000,  0.0000])

    Args:
        responses: tokens of each sample's response.

    Raises:
        AlgorithmError: n-grams of less than one token, or a negative penalty.
    """
    if ngram < 1:
        raise AlgorithmError(f"repetition of {ngram}-grams; they have 1 token or more")
    _require_not_negative(penalty=penalty)
    shares = [_repeated_share(tokens, ngram) for tokens in responses]
    return 0.0 - penalty * torch.tensor(shares, dtype=torch.float32)


def _repeated_share(tokens: Sequence[int], ngram: int) -> float:
    num_ngrams = len(tokens) - ngram + 1
    if num_ngrams < 1:
        return 0.0
    distinct = set(zip(*(tokens[start : start + num_ngrams] for start in range(ngram)), strict=True))
    return 1 - len(distinct) / num_ngrams


def _require_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise AlgorithmError(f"{name} is {number}; it must be 0 or more, and is subtracted")
