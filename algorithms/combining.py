"""Several rewards of one sample, made one.

Legend: N samples. Scores are raw: logits, not probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.advantages import whiten
from algorithms.errors import AlgorithmError
from algorithms.shapes import require_same_length

#: Llama 2: of this probability the safety reward model had precision 0.89 and recall 0.55 on Meta's test set.
SAFETY_THRESHOLD = 0.15


def safety_decides(safety_N: Tensor, safety_prompts_N: Tensor, threshold: float = SAFETY_THRESHOLD) -> Tensor:
    """Where the safety score is the reward, (N,) bool: the prompt is one of safety, or the response seems unsafe.

    ``safety_prompt or sigmoid(safety) < threshold`` (Touvron et al. 2023, Llama 2), read on the logit:
    ``safety < ln(threshold / (1 - threshold))``. A sigmoid would saturate, and in half precision be 1.0 exactly.

    Args:
        safety_prompts_N: bool, tagged in the data.

    Raises:
        AlgorithmError: lengths differ, or the threshold is no probability.
    """
    require_same_length(safety=safety_N, safety_prompts=safety_prompts_N)
    if not 0 < threshold < 1:
        raise AlgorithmError(f"the safety threshold is {threshold}; it is a probability between 0 and 1")
    # Not "below": a NaN must not be taken for safe.
    return safety_prompts_N.bool() | ~(safety_N >= math.log(threshold / (1 - threshold)))


def piecewise(
    helpfulness_N: Tensor, safety_N: Tensor, safety_prompts_N: Tensor, threshold: float = SAFETY_THRESHOLD
) -> Tensor:
    """The safety score where ``safety_decides``, else the helpfulness score, (N,), not yet whitened.

    Llama 2's ``LOGIT(R_c)``, where R_c is of probabilities; of logits, the logit of the sigmoid is the logit.

    >>> piecewise(torch.tensor([3.0, 3.0]), torch.tensor([2.0, -2.0]), torch.tensor([False, False]))
    tensor([ 3., -2.])

    Raises:
        AlgorithmError: lengths differ, or the threshold is no probability.
    """
    require_same_length(helpfulness=helpfulness_N, safety=safety_N)
    return torch.where(safety_decides(safety_N, safety_prompts_N, threshold), safety_N, helpfulness_N)


def whitened_piecewise(
    helpfulness_N: Tensor, safety_N: Tensor, safety_prompts_N: Tensor, threshold: float = SAFETY_THRESHOLD
) -> Tensor:
    """``WHITEN(LOGIT(R_c))`` of Llama 2, (N,): ``piecewise`` with mean 0 and variance 1. The KL is subtracted after.

    The paper does not say what is whitened over. Give it the whole global batch.

    Raises:
        AlgorithmError: lengths differ, or the threshold is no probability.
    """
    return whiten(piecewise(helpfulness_N, safety_N, safety_prompts_N, threshold))


def linear(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """``sum of weight * score`` over the named rewards, (N,).

    >>> linear({"help": torch.tensor([1.0]), "safe": torch.tensor([4.0])}, {"help": 1.0, "safe": 0.5})
    tensor([3.])

    Raises:
        AlgorithmError: there are none, names of scores and weights differ, or scores differ in length.
    """
    if not scores or scores.keys() != weights.keys():
        raise AlgorithmError(f"scores of {sorted(scores)} with weights of {sorted(weights)}; give one weight a score")
    require_same_length(**scores)
    # Summed in the order of the names, so that the order of the configuration is not in the last digit.
    return torch.stack([weights[name] * scores[name] for name in sorted(scores)]).sum(0)


def gated(scores_N: Tensor, gates_N: Tensor, *, threshold: float, replacement: float) -> Tensor:
    """``replacement`` where the gate's score is below the threshold, else the score, (N,).

    A gate of NaN is closed.

    >>> gated(torch.tensor([5.0, 6.0]), torch.tensor([0.2, 0.5]), threshold=0.5, replacement=-1.0)
    tensor([-1.,  6.])

    Raises:
        ShapeMismatch: the two differ in length.
    """
    require_same_length(scores=scores_N, gates=gates_N)
    return scores_N.masked_fill(~(gates_N >= threshold), replacement)
