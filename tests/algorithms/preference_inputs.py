"""All losses over pairs behind one face, and random pairs for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from algorithms.losses import Loss
from algorithms.preferences import (
    conservative_dpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    nll_term,
    orpo_loss,
    reference_free_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
    slic_loss,
)
from tests.algorithms import slow_preferences as slow

NUM_PAIRS = 40
BETA, SMOOTHING = slow.BETA, slow.SMOOTHING

#: policy of chosen and rejected, reference of both, lengths of both; all (N,).
Inputs = list[Tensor]
Function = Callable[[Inputs, float], Loss]

WITH_REFERENCE: dict[str, Function] = {
    "dpo": lambda x, n: dpo_loss(*x[:4], beta=BETA, denominator=n),
    "conservative": lambda x, n: conservative_dpo_loss(*x[:4], beta=BETA, label_smoothing=SMOOTHING, denominator=n),
    "robust": lambda x, n: robust_dpo_loss(*x[:4], beta=BETA, label_smoothing=SMOOTHING, denominator=n),
    "ipo": lambda x, n: ipo_loss(*x[:4], beta=BETA, denominator=n),
    "hinge": lambda x, n: hinge_loss(*x[:4], beta=BETA, denominator=n),
}
WITHOUT_REFERENCE: dict[str, Function] = {
    "slic": lambda x, n: slic_loss(*x[:2], margin=slow.MARGIN, denominator=n),
    "reference_free": lambda x, n: reference_free_dpo_loss(*x[:2], beta=BETA, denominator=n),
    "simpo": lambda x, n: simpo_loss(*x[:2], *x[4:], beta=BETA, gamma=slow.GAMMA, denominator=n),
    "orpo": lambda x, n: orpo_loss(*x[:2], *x[4:], coefficient=slow.COEFFICIENT, denominator=n),
    "nll": lambda x, n: nll_term(x[0], x[4], coefficient=slow.COEFFICIENT, denominator=n),
}
LOSSES = WITH_REFERENCE | WITHOUT_REFERENCE
OF_LENGTHS = ["simpo", "orpo", "nll"]


def random_pairs(seed: int = 0) -> Inputs:
    """Responses of 1 to 9 tokens, of about -1.5 nats each, with log ratios of a few nats of either sign."""
    source = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 10, (NUM_PAIRS,), generator=source) for _ in range(2)]
    ref = [-x * (0.5 + 2 * torch.rand(NUM_PAIRS, dtype=torch.float64, generator=source)) for x in lengths]
    policy = [x * (0.4 + 1.2 * torch.rand(NUM_PAIRS, dtype=torch.float64, generator=source)) for x in ref]
    return [*policy, *ref, *lengths]


def slow_pairs(inputs: Inputs) -> list[slow.Pair]:
    policy_w, policy_v, ref_w, ref_v, length_w, length_v = inputs
    return [
        slow.Pair(w, v, *rest)
        for w, v, *rest in zip(
            policy_w, policy_v, ref_w.tolist(), ref_v.tolist(), length_w.tolist(), length_v.tolist(), strict=True
        )
    ]


def following(inputs: Inputs) -> Inputs:
    """The same, with a gradient to follow in the policy's log-probs."""
    return [inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(), *inputs[2:]]


def slopes(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs[:2], allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(inputs, found, strict=False)]


def floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(metric) for name, metric in metrics.items()}
