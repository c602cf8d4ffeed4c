"""Where a reward model's scores lie: a map of them that is measured after training and exported with the model.

Training fixes differences of scores alone, so their level, and with ``gain`` their unit, may be set afterwards.

Invariant: the map does not depend on the number of ranks or on how rows are packed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.errors import RoleError
from actors.models import SCORE_BIAS, TokenScorer


@dataclass(frozen=True)
class ScoreMap:
    """``gain * score + bias``, and what it was made from: mean and deviation (biased) of ``num_rows`` scores."""

    gain: float
    bias: float
    mean: float
    std: float
    num_rows: int


def score_map(count: float, total: float, squares: float, *, unit_std: bool) -> ScoreMap:
    """The map that gives mean 0, and with ``unit_std`` deviation 1, to scores with these moments.

    Mean 0: Ouyang et al. 2022 (InstructGPT), on demonstrations. Both: Ziegler et al. 2019, on samples of the policy.

    Args:
        count: scores.
        total: their sum.
        squares: sum of squared distances from the mean.

    Raises:
        RoleError: there is no score, or they are not finite, or all equal where a deviation of 1 is asked for.
    """
    if not count or not math.isfinite(total + squares):
        raise RoleError(f"{count:g} scores with sum {total:g} cannot be normalised")
    mean, std = total / count, math.sqrt(squares / count)
    if unit_std and not std > 0:
        raise RoleError(f"all {count:g} scores are {mean:g}: nothing gives them a deviation of 1")
    gain = 1 / std if unit_std else 1.0
    return ScoreMap(gain, -gain * mean, mean, std, int(count))


def fold(model: TokenScorer, weights: dict[str, Tensor], mapped: ScoreMap) -> None:
    """Change ``weights``, by Hugging Face name, so that they give mapped scores.

    The gain goes into the head's weight, the bias into its bias. Most sequence-classification heads have none: then it
    goes into the model's configuration, and ``TokenScorer`` adds it wherever the model is loaded.
    """
    weight, bias = f"{model.head_name}.weight", f"{model.head_name}.bias"
    weights[weight] = _mapped(weights[weight], mapped.gain, 0.0)
    constant = mapped.gain * model.score_bias
    if bias in weights:
        weights[bias] = _mapped(weights[bias], mapped.gain, mapped.bias)
    else:
        constant += mapped.bias
    if constant or model.score_bias:
        setattr(model.config, SCORE_BIAS, constant)


@torch.no_grad()
def _mapped(values: Tensor, gain: float, bias: float) -> Tensor:
    return (values.double() * gain + bias).to(values.dtype)
