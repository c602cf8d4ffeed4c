"""KL divergence between policy and reference: per-token estimators, and the controller of its weight.

Importing this imports no torch: a driver steers the coefficient and touches no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from algorithms.errors import AlgorithmError

if TYPE_CHECKING:
    from torch import Tensor

#: Ziegler et al. 2019, section 2.2: the error is clipped to this, so that one odd batch moves the weight little.
MAX_ERROR = 0.2


def k1(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``log p - log q`` of tokens drawn from p, (T,): unbiased for KL(p, q), may be negative.

    (Schulman, "Approximating KL divergence", 2020; so are k2 and k3.)
    """
    return logprobs_T - ref_logprobs_T


def k2(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``(log p - log q)^2 / 2``, (T,): biased, low variance, never negative."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``q/p - 1 - log(q/p)``, (T,): unbiased, never negative.

    Through ``expm1``: in float32 ``exp(x) - 1 - x`` is mere rounding where log-probs differ by less than 1e-3.
    """
    difference = ref_logprobs_T - logprobs_T
    return difference.expm1() - difference


def k1_with_gradient(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """The number of k1 with the gradient of k2, (T,), for a loss: both unbiased for KL(p, q), of tokens drawn from p.

    k1's own gradient is that of ``log p``, which is 0 in expectation whatever q is: a penalty that does nothing.
    """
    half_square_T = k2(logprobs_T, ref_logprobs_T)
    return k1(logprobs_T, ref_logprobs_T).detach() + (half_square_T - half_square_T.detach())


_Estimator = Callable[["Tensor", "Tensor"], "Tensor"]
#: In the reward, where there is no gradient.
ESTIMATORS: Mapping[str, _Estimator] = {"k1": k1, "k2": k2, "k3": k3}
#: In the loss, by the same names.
LOSS_ESTIMATORS: Mapping[str, _Estimator] = {"k1": k1_with_gradient, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class KLController:
    """The weight of the KL penalty, fixed or steered towards a target (Ziegler et al. 2019, section 2.2).

    ``target`` is in nats a sample (summed over its tokens); none keeps the coefficient as it is.
    ``horizon_samples`` is over how many samples the coefficient moves by the error.

    Raises:
        AlgorithmError: a negative coefficient, or a target or horizon that is not positive.
    """

    coefficient: float
    target: float | None
    horizon_samples: int

    def __post_init__(self) -> None:
        if not (self.coefficient >= 0 and math.isfinite(self.coefficient)):
            raise AlgorithmError(f"KL coefficient {self.coefficient}; it must be a finite number, 0 or more")
        if self.target is not None and not self.target > 0:
            raise AlgorithmError(f"KL target {self.target} nats a sample; it must be above 0")
        if self.horizon_samples < 1:
            raise AlgorithmError(f"KL horizon of {self.horizon_samples} samples; it must be 1 or more")

    def updated(self, kl_per_sample: float, num_samples: int) -> KLController:
        """After a batch of ``num_samples`` whose mean KL was ``kl_per_sample`` nats.

        ``e = clip(KL / target - 1, -0.2, 0.2); coefficient *= 1 + e * num_samples / horizon``.

        >>> KLController(0.1, target=6.0, horizon_samples=1000).updated(12.0, 100).coefficient
        0.10200000000000001

        Raises:
            AlgorithmError: the KL is not finite, or the batch is so large against the horizon (5 times) that a KL
                below target would make the coefficient 0 or negative.
        """
        if self.target is None:
            return self
        if not math.isfinite(kl_per_sample):
            raise AlgorithmError(f"mean KL of the batch is {kl_per_sample} nats a sample; it must be finite")
        share = num_samples / self.horizon_samples
        if MAX_ERROR * share >= 1:
            raise AlgorithmError(
                f"batches of {num_samples} samples with a KL horizon of {self.horizon_samples}: the horizon must be "
                f"above {MAX_ERROR * num_samples:g}, or the coefficient may fall to 0 and below"
            )
        error = min(max(kl_per_sample / self.target - 1, -MAX_ERROR), MAX_ERROR)
        return replace(self, coefficient=self.coefficient * (1 + error * share))
