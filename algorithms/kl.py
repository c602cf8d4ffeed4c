"""KL divergence between policy and reference: per-token estimators, and the controller of its weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


def k1(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``log p - log q`` of tokens drawn from p, (T,): unbiased for KL(p, q), may be negative (Schulman 2020)."""
    return logprobs_T - ref_logprobs_T


def k2(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``(log p - log q)^2 / 2``, (T,): biased, low variance, never negative (Schulman 2020)."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """``q/p - 1 - log(q/p)``, (T,): unbiased, never negative (Schulman 2020)."""
    difference = ref_logprobs_T - logprobs_T
    return difference.exp() - 1 - difference


@dataclass(frozen=True)
class KLController:
    """The weight of the KL penalty, fixed or steered towards a target (Ziegler et al. 2019, section 2.2).

    ``target`` is in nats a sample (summed over its tokens); none keeps the coefficient as it is.
    """

    coefficient: float
    target: float | None
    horizon_samples: int

    def updated(self, kl_per_sample: float, num_samples: int) -> KLController:
        """After a batch of ``num_samples`` whose mean KL was ``kl_per_sample`` nats.

        ``e = clip(KL / target - 1, -0.2, 0.2); coefficient *= 1 + e * num_samples / horizon``.

        >>> KLController(0.1, target=6.0, horizon_samples=1000).updated(12.0, 100).coefficient
        0.10200000000000001
        """
        if self.target is None:
            return self
        error = min(max(kl_per_sample / self.target - 1, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1 + error * num_samples / self.horizon_samples))
